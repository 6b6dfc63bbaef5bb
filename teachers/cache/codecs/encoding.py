"""From a teacher's targets to the bytes of rows: a block of tokens at a time, never [tokens, vocabulary].

    payloads = encode_rows(HeadAndTail(16), targets, labels_BT, keys_B, vocabulary=4096)

Suffix legend: B rows, T tokens a row, V vocabulary, C tokens of a block, P random numbers of a token.
"""

from typing import Protocol

import numpy as np
import torch

from herd.run.errors import ConfigError, DataError, NumericalError
from teachers.cache.codecs.distributions import Distributions
from teachers.cache.codecs.draws import uniforms
from teachers.cache.codecs.kept import BLOCK
from teachers.cache.codecs.picks import Picks, gather
from teachers.targets import FullTargets, Tail


class Codec(Protocol):
    """Chooses classes. Its one number is `size`; what it chose is written and read the same way for every codec."""

    name: str
    tail: Tail
    size: int
    uniforms: int
    """Random numbers a token needs."""

    def pick(self, chunk: Distributions, uniforms_CP: np.ndarray) -> Picks:
        """Choose the classes of a block of tokens; may use up the chunk."""
        ...


def check_vocabulary(codec: Codec, vocabulary: int) -> None:
    """Raise ConfigError when top-k is asked for more classes than there are."""
    if codec.name == "top_k" and codec.size > vocabulary:
        raise ConfigError(f"top_k={codec.size} is more than the vocabulary of {vocabulary}; give at most {vocabulary}")


@torch.no_grad()
def encode_rows(
    codec: Codec,
    targets: FullTargets,
    labels_BT: torch.Tensor,
    keys_B: torch.Tensor,
    *,
    vocabulary: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[bytes]:
    """One payload a row. `targets` are over the B * T tokens in the order of the rows; labels are already shifted.

    What is drawn depends on the seed, a row's key and a token's place alone. Raises NumericalError that names the
    row and the token where logits are NaN or infinite, DataError for logits of another vocabulary,
    ConfigError for more classes than it has.
    """
    check_vocabulary(codec, vocabulary)
    length = labels_BT.shape[1]
    payloads = []
    for row, key in enumerate(keys_B.tolist()):
        picks, entropies, ces = [], [], []
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            logits_CV = targets.logits(slice(row * length + start, row * length + stop))
            if logits_CV.shape[1] != vocabulary:
                raise DataError(f"the teacher has logits of {logits_CV.shape[1]} classes, the cache is of {vocabulary}")
            try:
                chunk = Distributions.of(logits_CV, labels_BT[row, start:stop], temperature=temperature)
            except NumericalError as fault:
                raise NumericalError(f"row {row} (key {key}), block of tokens from {start}: {fault}") from fault
            entropies.append(chunk.entropy_C)
            ces.append(chunk.ce_C)
            places_C = np.arange(start, stop)
            picks.append(codec.pick(chunk, uniforms(key, places_C, stream=0, count=codec.uniforms, seed=seed)))
        kept = gather(picks, torch.cat(entropies).cpu().numpy(), torch.cat(ces).cpu().numpy())
        payloads.append(kept.to_bytes(vocabulary=vocabulary))
    return payloads
