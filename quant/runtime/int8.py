"""W8A8: int8 weights, one scale an output channel, inputs rounded to int8 with one scale a token, integer products.

    layer = Int8.pack([{"weight": ..., "weight_scale": ...}, ...]);  output_MN = layer.product(input_MK)

M rows, N output channels, K input channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant.runtime.linears import Linear, pad_rows

KERNEL_COLUMNS = 16  # `_weight_int8pack_mm` (torch 2.13) reads beyond its matrices unless K is a multiple


class Int8(Linear):
    """Few rows go through `aten._weight_int8pack_mm` (bf16 inputs), many through `torch._int_mm` (VNNI, AMX)."""

    def __init__(self, codes_NK: Tensor, scale_N: Tensor):
        super().__init__(*codes_NK.shape)
        self.codes = nn.Buffer(codes_NK, persistent=False)
        self.scale = nn.Buffer(scale_N, persistent=False)
        self.kernel_rows = 0
        """Inputs of at most that many rows go through the first kernel; `quant.runtime.crossovers` measures it."""

    @property
    def has_kernel(self) -> bool:
        """Whether the kernel for few rows can take the layer."""
        return self.in_features % KERNEL_COLUMNS == 0

    @classmethod
    def pack(cls, parts: Sequence[dict[str, Tensor]]) -> "Int8":
        """The layer of stored parts of one K: `weight` int8 [N, K], `weight_scale` [N, 1]."""
        scale_N1 = torch.cat([part["weight_scale"] for part in parts]).to(torch.bfloat16)
        return cls(torch.cat([part["weight"] for part in parts]), scale_N1.flatten())

    def product(self, input_MK: Tensor) -> Tensor:
        codes_MK, scale_M1 = round_tokens(input_MK)
        if len(input_MK) <= self.kernel_rows:
            return self.through_kernel(codes_MK, scale_M1)
        return self.through_integers(codes_MK, scale_M1)

    def through_kernel(self, codes_MK: Tensor, scale_M1: Tensor) -> Tensor:
        """[M, N] from inputs rounded and scaled back, summed in fp32."""
        return torch.ops.aten._weight_int8pack_mm(codes_MK * scale_M1, self.codes, self.scale)

    def through_integers(self, codes_MK: Tensor, scale_M1: Tensor) -> Tensor:
        """[M, N]: exact integer sums, scaled in fp32."""
        sums_MN = torch._int_mm(pad_rows(codes_MK.to(torch.int8)), self.codes.t())[: len(codes_MK)]
        return (sums_MN * scale_M1.float()).mul_(self.scale).to(codes_MK.dtype)


def round_tokens(input_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -128..127 [M, K], in the input's dtype, and scales [M, 1], as `quant.formats.int8` rounds them."""
    scale_M1 = input_MK.abs().amax(-1, keepdim=True) / 127.5
    scale_M1 = torch.where(scale_M1 == 0, torch.finfo(scale_M1.dtype).eps, scale_M1)
    return (input_MK / scale_M1).round_().clamp_(-128, 127), scale_M1
