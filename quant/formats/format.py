"""What every number format offers: the stored tensors of a linear layer, how they are filled, what they stand for.

    format.stored((N, K))                       # suffix -> (dtype, shape), before anything is read
    tensors = format.compress(weight_NK, Ranges())
    weight_NK = format.decompress(tensors)      # bf16, bit for bit what readers of the format make of it

N output channels, K input channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats.grid import Grid

Header = tuple[torch.dtype, tuple[int, ...]]
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Ranges:
    """The largest magnitudes a format with one scale a tensor needs: of the weights and of the inputs of a layer.

    Both are taken over all layers that must share the scale (`quant.architectures.weight_tie`, `input_tie`).
    """

    weight_absmax: float | None = None
    input_absmax: float | None = None


class Format(ABC):
    """One number format. `grid` is set for those whose codes lie on a uniform integer grid."""

    grid: Grid | None = None
    needs_weight_range = False
    needs_input_range = False

    @abstractmethod
    def fault(self, shape: tuple[int, int]) -> str | None:
        """Why a layer of this [N, K] cannot be stored; None when it can."""

    @abstractmethod
    def stored(self, shape: tuple[int, int]) -> dict[str, Header]:
        """Suffix, dtype and shape of every tensor a linear layer [N, K] is stored as."""

    @abstractmethod
    def compress(self, weight_NK: Tensor, ranges: Ranges) -> dict[str, Tensor]:
        """The stored tensors of a finite weight, by suffix, rounded to nearest."""

    @abstractmethod
    def decompress(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The bf16 weight [N, K] that stored tensors stand for."""

    def input_rounding(self, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor] | None:
        """What happens to the layer's input [..., K] at run time; None where it stays as it is."""
        return None


def undivided(columns: int, size: int, what: str) -> str | None:
    """The fault of an input dimension that does not divide; None when it does."""
    return None if columns % size == 0 else f"{columns} input channels do not divide by {what} {size}"


def by_rows(work: Callable[[Tensor], tuple[Tensor, ...]], weight_NK: Tensor) -> tuple[Tensor, ...]:
    """Results of `work` on a few rows (fp32) at a time, joined: bounded memory for a matrix of any size."""
    step = max(1, CHUNK_ELEMENTS // weight_NK.shape[1])
    parts = [work(weight_NK[start : start + step].float()) for start in range(0, len(weight_NK), step)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))
