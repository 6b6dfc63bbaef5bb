"""The classes a codec chose for a chunk of tokens, and how the chunks of a row become its `Kept`.

    picks = codec.pick(chunk, uniforms_CP)
    kept = gather([picks, ...], entropy_T, ce_T)

Suffix legend: C tokens of a chunk, K places for classes, H classes with a mass of their own, S sampled ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from teachers.cache.codecs.kept import Kept

NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Picks:
    """As `Kept`, of one chunk: tokens are counted from its first."""

    tokens_H: np.ndarray
    ids_H: np.ndarray
    units_H: np.ndarray
    tokens_S: np.ndarray
    ids_S: np.ndarray
    total: int
    """Units a token's mass is counted in."""
    num_tokens: int

    @classmethod
    def own(cls, units_CK: torch.Tensor, ids_CK: torch.Tensor, *, total: int) -> "Picks":
        """Classes with a mass of their own and nothing else; places with no unit are left out."""
        return cls(*_listed(units_CK, ids_CK), NONE, NONE, total, len(units_CK))

    @classmethod
    def own_and_sampled(
        cls,
        units_CK: torch.Tensor,
        ids_CK: torch.Tensor,
        sampled_CK: torch.Tensor,
        drawn_CK: torch.Tensor,
        *,
        total: int,
    ) -> "Picks":
        """The same, with the classes of `sampled_CK` where `drawn_CK`, each once."""
        own = _listed(units_CK, ids_CK)
        tokens_S, ids_S, _ = _listed(drawn_CK.long(), sampled_CK)
        tokens_S, ids_S = np.unique(np.stack([tokens_S, ids_S]), axis=1)  # rounding may lead two points to one class
        return cls(*own, tokens_S, ids_S, total, len(units_CK))


def _listed(units_CK: torch.Tensor, ids_CK: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    units_CK, ids_CK = units_CK.cpu().numpy(), ids_CK.cpu().numpy()
    tokens_H, places_H = np.nonzero(units_CK)
    return tokens_H, ids_CK[tokens_H, places_H], units_CK[tokens_H, places_H]


def gather(parts: Sequence[Picks], entropy_T: np.ndarray, ce_T: np.ndarray) -> Kept:
    """A row's `Kept` from its chunks, in order."""
    starts = np.cumsum([0, *(part.num_tokens for part in parts[:-1])])
    return Kept(
        tokens_H=np.concatenate([part.tokens_H + start for part, start in zip(parts, starts, strict=True)]),
        ids_H=np.concatenate([part.ids_H for part in parts]),
        units_H=np.concatenate([part.units_H for part in parts]),
        tokens_S=np.concatenate([part.tokens_S + start for part, start in zip(parts, starts, strict=True)]),
        ids_S=np.concatenate([part.ids_S for part in parts]),
        totals_B=np.array([part.total for part in parts]),
        entropy_T=entropy_T,
        ce_T=ce_T,
    )
