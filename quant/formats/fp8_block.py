"""FP8 E4M3 with one scale for each 128 x 128 block of weights, activations in groups of 128 at run time.

    Fp8Block()                       # compressed-tensors: `weight_scale` in bf16
    Fp8Block(inverse=True)           # fine-grained fp8: `weight_scale_inv` in fp32; same codes, same values

N output channels, K input channels, blocks A x B of 128 rows and columns each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats.format import Format, Header, Ranges, undivided
from quant.formats.fp8 import E4M3, dynamic_scale, encode, fake_quantise, scale_for

BLOCK = 128


@dataclass(frozen=True)
class Fp8Block(Format):
    inverse: bool = False
    """Names and precision of the fine-grained fp8 folder: a factor all the same, despite the name."""

    @property
    def scale_name(self) -> str:
        return "weight_scale_inv" if self.inverse else "weight_scale"

    def fault(self, shape: tuple[int, int]) -> str | None:
        # Readers merge layers block by block and derive the block from the scales' shape: no ragged edges.
        if shape[0] % BLOCK:
            return f"{shape[0]} output channels do not divide by blocks of {BLOCK}"
        return undivided(shape[1], BLOCK, "blocks of")

    def stored(self, shape: tuple[int, int]) -> dict[str, Header]:
        dtype = torch.float32 if self.inverse else torch.bfloat16
        return {"weight": (E4M3, shape), self.scale_name: (dtype, (shape[0] // BLOCK, shape[1] // BLOCK))}

    def compress(self, weight_NK: Tensor, ranges: Ranges) -> dict[str, Tensor]:
        blocks_ANBK = _blocks(weight_NK)
        scale_AB = scale_for(blocks_ANBK.abs().amax((1, 3)))
        codes_NK = encode(blocks_ANBK, scale_AB[:, None, :, None]).view(weight_NK.shape)
        return {"weight": codes_NK, self.scale_name: scale_AB.float() if self.inverse else scale_AB}

    def decompress(self, tensors: Mapping[str, Tensor]) -> Tensor:
        scale_AB = tensors[self.scale_name].to(torch.bfloat16)
        codes_NK = tensors["weight"].to(torch.bfloat16)
        return (_blocks(codes_NK) * scale_AB[:, None, :, None]).view(codes_NK.shape)

    def input_rounding(self, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return fake_quantise_groups


def fake_quantise_groups(input: Tensor) -> Tensor:
    """Activations [..., K] rounded with one scale for each token and 128 channels."""
    groups = input.unflatten(-1, (-1, BLOCK))
    return fake_quantise(groups, dynamic_scale(groups)).flatten(-2)


def _blocks(matrix_NK: Tensor) -> Tensor:
    return matrix_NK.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
