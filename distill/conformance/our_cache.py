"""Our teacher cache as a target, one a codec: written to a folder, closed, opened and read by key.

    python -m distill.conformance --target distill.conformance.our_cache:head_and_tail

Shapes: N rows, T tokens a row, K classes listed, V vocabulary, C tokens of a chunk.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from teachers import cache
from teachers.cache.codecs import parse
from teachers.targets import LEAST_LOGIT, Tail

CODECS = ("head_and_tail", "rs_kd", "top_k")
LEAST_VOCABULARY = 4096
Read = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def head_and_tail(input_ids_NT: torch.Tensor, teacher_ids_NTK: torch.Tensor, teacher_probs_NTK: torch.Tensor) -> Read:
    """The default: large masses, and a sample of the small ones."""
    return _stored("head_and_tail=14", input_ids_NT, teacher_ids_NTK, teacher_probs_NTK)


def rs_kd(input_ids_NT: torch.Tensor, teacher_ids_NTK: torch.Tensor, teacher_probs_NTK: torch.Tensor) -> Read:
    """Independent draws."""
    return _stored("rs_kd=50", input_ids_NT, teacher_ids_NTK, teacher_probs_NTK)


def top_k(input_ids_NT: torch.Tensor, teacher_ids_NTK: torch.Tensor, teacher_probs_NTK: torch.Tensor) -> Read:
    """As many of the largest as are listed."""
    return _stored(f"top_k={teacher_ids_NTK.shape[-1]}", input_ids_NT, teacher_ids_NTK, teacher_probs_NTK)


head_and_tail.conformance = rs_kd.conformance = {"tail": "sampled"}


@dataclass(frozen=True)
class _Listed:
    """A teacher of which a few classes are known, as FullTargets: the rest of the mass lies evenly on all others."""

    ids_TK: torch.Tensor
    probs_TK: torch.Tensor
    vocabulary: int
    tail: Tail

    def logits(self, rows: slice) -> torch.Tensor:
        ids_CK, probs_CK = self.ids_TK[rows], self.probs_TK[rows].double()
        others_C1 = torch.full_like(probs_CK[:, :1], LEAST_LOGIT)
        if self.tail == "bucket":
            others_C1 = ((1 - probs_CK.sum(1, keepdim=True)) / (self.vocabulary - ids_CK.shape[1])).log()
        return others_C1.repeat(1, self.vocabulary).scatter_(1, ids_CK, probs_CK.log())

    @property
    def num_tokens(self) -> int:
        return len(self.ids_TK)


def _stored(codec: str, input_ids_NT: torch.Tensor, ids_NTK: torch.Tensor, probs_NTK: torch.Tensor) -> Read:
    """Write all rows under their places as keys; `read` asks for the first places, so rows must be what they were."""
    rows, length = input_ids_NT.shape
    vocabulary = max(LEAST_VOCABULARY, int(ids_NTK.max()) + 1)
    identity = cache.Identity("conformance", vocabulary, length, 1.0, "conformance", "conformance")
    keys_N = torch.arange(rows)
    teacher = _Listed(ids_NTK.flatten(0, 1), probs_NTK.flatten(0, 1), vocabulary, parse(codec).tail)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        with cache.create(path, identity, codec).writer() as writer:
            writer.append(teacher, keys_N, input_ids_NT, torch.zeros_like(input_ids_NT), step=0)
        reader = cache.open(path, expecting=identity)  # its maps outlive the folder

    def read(wanted_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = reader.targets(keys_N[: len(wanted_NT)], wanted_NT)
        return found.ids_TK.unflatten(0, wanted_NT.shape), found.probs_TK.unflatten(0, wanted_NT.shape)

    return read
