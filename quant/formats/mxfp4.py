"""MXFP4 weights: E2M1 elements, one power of two (E8M0, a byte) for each 32 of a row; activations stay bf16.

    tensors = Mxfp4().compress(weight_NK, Ranges())       # {"weight_packed" uint8, "weight_scale" uint8}

N output channels, K input channels, G groups of a row, S weights in a group.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quant.formats import fp4
from quant.formats.format import Format, Header, Ranges, by_rows, undivided

GROUP = 32
BIAS = 127


class Mxfp4(Format):
    """compressed-tensors' `mxfp4-pack-quantized`."""

    def fault(self, shape: tuple[int, int]) -> str | None:
        return undivided(shape[1], GROUP, "groups of")

    def stored(self, shape: tuple[int, int]) -> dict[str, Header]:
        rows, columns = shape
        return {
            "weight_packed": (torch.uint8, (rows, columns // 2)),
            "weight_scale": (torch.uint8, (rows, columns // GROUP)),
        }

    def compress(self, weight_NK: Tensor, ranges: Ranges) -> dict[str, Tensor]:
        packed, exponent_NG = by_rows(_compress_rows, weight_NK)
        return {"weight_packed": packed, "weight_scale": exponent_NG}

    def decompress(self, tensors: Mapping[str, Tensor]) -> Tensor:
        values_NGS = fp4.decode(fp4.unpack(tensors["weight_packed"])).unflatten(-1, (-1, GROUP))
        return (values_NGS * _scale(tensors["weight_scale"])[..., None]).flatten(-2).to(torch.bfloat16)


def usual_exponent(absmax_NG: Tensor) -> Tensor:
    """The stored exponent of the plain recipe: floor(log2(absmax)) - 2, one more from a mantissa of 1.75 on.

    (The OCP rule as compressed-tensors applies it: 6, the largest element, is 1.5 * 2^2.)
    """
    mantissa_NG, exponent_NG = torch.frexp(absmax_NG)  # mantissa in [0.5, 1)
    exponent_NG = exponent_NG - 1 + (mantissa_NG >= 0.875).int()
    return torch.where(absmax_NG == 0, BIAS, (exponent_NG - 2 + BIAS).clamp(1, 253)).to(torch.uint8)


def _compress_rows(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    weight_NGS = weight_NK.unflatten(-1, (-1, GROUP))
    usual_NG = usual_exponent(weight_NGS.abs().amax(-1)).int()
    scale_NG = fp4.best_scale(weight_NGS, [_scale((usual_NG + step).clamp(1, 254)) for step in (0, -1, 1)])
    packed = fp4.pack(fp4.encode(weight_NGS / scale_NG[..., None]).flatten(-2))
    return packed, (torch.frexp(scale_NG)[1] - 1 + BIAS).to(torch.uint8)


def _scale(exponent_NG: Tensor) -> Tensor:
    exponent_NG = exponent_NG.int() - BIAS
    return torch.ldexp(torch.ones(exponent_NG.shape), exponent_NG)
