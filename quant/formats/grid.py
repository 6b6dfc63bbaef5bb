"""Uniform integer grids: value = scale * (code - zero), one scale (and zero) for each group of a row.

    grid = Grid(bits=4, symmetric=True, group_size=64)
    parameters = grid.search(weight_NK)                  # round to nearest needs no more than these three lines
    codes_NK = grid.encode(weight_NK, parameters);  weight_NK = grid.decode(codes_NK, parameters)

N output channels, K input channels, G groups of a row. Leading dimensions (experts E) may stand before N everywhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats.grid_search import search_groups, storable

HALF_LARGEST, HALF_SMALLEST = 65280.0, 2.0**-24  # representable in fp16 and in bf16


@dataclass(frozen=True)
class Parameters:
    """What a grid needs besides its codes."""

    scale_NG: Tensor
    """fp32, exactly representable in bf16, never zero. May be negative on a symmetric grid."""
    zero_NG: Tensor | None = None
    """int8, within the range of the codes; None on a symmetric grid."""


@dataclass(frozen=True)
class Grid:
    bits: int
    """4 or 8: codes lie in [-2^(bits - 1), 2^(bits - 1) - 1]."""
    symmetric: bool
    """The zero is 0 and is not stored."""
    group_size: int | None
    """Weights of a row that share parameters; None: all of a row, which is an output channel."""
    half: bool = False
    """Scales are exactly representable in fp16 too (GGUF)."""

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def groups(self, columns: int) -> int:
        """How many groups a row of that many columns has."""
        return 1 if self.group_size is None else columns // self.group_size

    def search(self, weight_NK: Tensor, importance_K: Tensor | None = None) -> Parameters:
        """The parameters of every group of a finite weight (`grid_search`), for rounding to nearest.

        importance_K: non-negative factors of the errors of each input channel, one set [K] or one an expert [E, K].
        """
        if weight_NK.ndim > 2:
            shape = (*weight_NK.shape[:-2], weight_NK.shape[-1])
            importance = [None] * len(weight_NK) if importance_K is None else importance_K.expand(shape)
            found = [self.search(*pair) for pair in zip(weight_NK, importance, strict=True)]
            zeros = None if self.symmetric else torch.stack([part.zero_NG for part in found])
            return Parameters(torch.stack([part.scale_NG for part in found]), zeros)
        rows, columns = weight_NK.shape
        groups = self.groups(columns)
        importance_GS = None if importance_K is None else importance_K.float().view(groups, -1)
        scale_M, zero_M = search_groups(
            weight_NK.reshape(rows * groups, -1), importance_GS, bits=self.bits, symmetric=self.symmetric
        )
        scale_NG = self.storable(scale_M).view(rows, groups)
        return Parameters(scale_NG, None if zero_M is None else zero_M.view(rows, groups))

    def storable(self, scale: Tensor) -> Tensor:
        """Scales rounded to what the format holds, fp32, never zero; for those that `search` did not find."""
        scale = storable(scale)
        if not self.half:
            return scale
        exact = scale.clamp(-HALF_LARGEST, HALF_LARGEST).to(torch.float16).float()
        return torch.where(exact == 0, HALF_SMALLEST, exact)

    def encode(self, weight_NK: Tensor, parameters: Parameters) -> Tensor:
        """The nearest codes, int8 [N, K]: clamp(round(weight / scale + zero)), ties to even, worked out in fp32.

        Groups are told from the shape of the parameters: a single column with scales [N, 1] will do.
        """
        weight_NGS = weight_NK.float().unflatten(-1, (parameters.scale_NG.shape[-1], -1))
        codes_NGS = weight_NGS / parameters.scale_NG[..., None]
        if parameters.zero_NG is not None:
            codes_NGS += parameters.zero_NG[..., None]
        return codes_NGS.round_().clamp_(self.lowest, self.highest).to(torch.int8).flatten(-2)

    def decode(self, codes_NK: Tensor, parameters: Parameters) -> Tensor:
        """The bf16 values [N, K]: one exact product, rounded once, as every reader of the formats does."""
        values_NGS = codes_NK.unflatten(-1, (parameters.scale_NG.shape[-1], -1)).to(torch.bfloat16)
        if parameters.zero_NG is not None:
            values_NGS -= parameters.zero_NG[..., None].to(torch.bfloat16)
        return (values_NGS * parameters.scale_NG[..., None].to(torch.bfloat16)).flatten(-2)
