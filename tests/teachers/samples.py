"""Small caches and teachers the tests of this room share; everything seeded."""

from pathlib import Path

import torch

from teachers import cache
from teachers.targets import DenseTargets

LENGTH, VOCABULARY = 12, 50

IDENTITY = cache.Identity(
    tokenizer="tokenizer-a", vocabulary=VOCABULARY, sequence_length=LENGTH, temperature=1.0, data="data-a", teacher="a"
)


def peaked_logits(tokens: int, vocabulary: int, *, seed: int = 0) -> torch.Tensor:
    """Logits with heads of many shapes: tokens from almost certain to almost flat."""
    generator = torch.Generator().manual_seed(seed)
    sharpness_T1 = torch.linspace(0.3, 6.0, tokens)[:, None]
    return sharpness_T1 * torch.randn(tokens, vocabulary, generator=generator)


class Rows:
    """Rows with keys, tokens, labels and a teacher's logits."""

    def __init__(self, count: int, *, seed: int = 0, first_key: int = -1000) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.keys_B = torch.arange(count) * 7919 + first_key
        tokens_BT1 = torch.randint(0, VOCABULARY, (count, LENGTH + 1), generator=generator)
        self.input_ids_BT, self.labels_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
        self.logits_TV = peaked_logits(count * LENGTH, VOCABULARY, seed=seed)

    def write(self, writer: cache.Writer, rows: slice = slice(None), *, step: int = 0) -> None:
        logits_TV = self.logits_TV.view(-1, LENGTH, VOCABULARY)[rows].flatten(0, 1)
        writer.append(
            DenseTargets(logits_TV), self.keys_B[rows], self.input_ids_BT[rows], self.labels_BT[rows], step=step
        )


def make_cache(folder: Path, rows: Rows, *, codec: str = "head_and_tail=4", step: int = 0) -> Path:
    """A sealed cache of these rows."""
    with cache.create(folder, IDENTITY, codec).writer() as writer:
        rows.write(writer, step=step)
    return folder
