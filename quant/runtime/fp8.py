"""FP8 E4M3 kept as 8 bits: CPUs have no product for it, so tiles become bf16 in the cache as they are multiplied.

    layer = Fp8.pack([{"weight": ..., "weight_scale": ...}, ...], rounds_inputs=True)
    output_MN = layer.product(input_MK)

M rows, N output channels, K input channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from herd.run.errors import DataError
from quant.formats.fp8 import fake_quantise_tokens
from quant.runtime.linears import TILE_ELEMENTS, Linear, multiply

# E4M3 moved four bits to the left is a bf16 with 2^-120 of the value: 7 is its exponent's bias, 127 that of bf16.
MOVED = 2.0**120
KEPT_BITS = -0x7810  # 0x87F0 as int16: sign, four bits of exponent, three of mantissa


class Fp8(Linear):
    """One scale an output channel or a tensor; `rounds_inputs`: inputs are rounded to E4M3 with one scale a token."""

    def __init__(self, codes_NK: Tensor, scale_N1: Tensor, *, rounds_inputs: bool):
        super().__init__(*codes_NK.shape)
        self.codes = nn.Buffer(codes_NK, persistent=False)
        self.moved_scale = nn.Buffer(scale_N1 * MOVED, persistent=False)
        if not self.moved_scale.isfinite().all():
            raise DataError(f"a weight_scale of {scale_N1.max().item():g} is too large; the largest here is 127")
        self.rounds_inputs = rounds_inputs

    @classmethod
    def pack(cls, parts: Sequence[dict[str, Tensor]], *, rounds_inputs: bool) -> "Fp8":
        """The layer of stored parts of one K: `weight` E4M3 [N, K], `weight_scale` [N, 1] or [1]."""
        scales = [
            part["weight_scale"].to(torch.bfloat16).reshape(-1, 1).expand(len(part["weight"]), 1) for part in parts
        ]
        codes = [part["weight"].view(torch.int8) for part in parts]
        return cls(torch.cat(codes), torch.cat(scales), rounds_inputs=rounds_inputs)

    def product(self, input_MK: Tensor) -> Tensor:
        if self.rounds_inputs:
            input_MK = fake_quantise_tokens(input_MK)
        output_MN = input_MK.new_empty(len(input_MK), self.out_features)
        step = max(1, TILE_ELEMENTS // self.in_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            output_MN[:, rows] = multiply(input_MK, widen(self.codes[rows], self.moved_scale[rows]))
        return output_MN


def widen(codes_NK: Tensor, moved_scale_N1: Tensor) -> Tensor:
    """bf16 weights [N, K] of E4M3 bytes (int8) and bf16 scales times 2^120: the exact product, rounded once."""
    bits_NK = codes_NK.to(torch.int16).bitwise_left_shift_(4).bitwise_and_(KEPT_BITS)
    return bits_NK.view(torch.bfloat16).mul_(moved_scale_N1)
