"""NVFP4 weights: E2M1 elements, an E4M3 scale for each 16 of a row, one fp32 factor a tensor; activations stay bf16.

    tensors = Nvfp4().compress(weight_NK, Ranges(weight_absmax=0.31))    # value = element * scale / global scale

N output channels, K input channels, G groups of a row, S weights in a group.
"""

from collections.abc import Mapping
from functools import partial
from math import floor, log2

import torch
from torch import Tensor

from quant.formats import fp4
from quant.formats.format import Format, Header, Ranges, by_rows, undivided
from quant.formats.fp8 import E4M3, LARGEST

GROUP = 16
SMALLEST = 2.0**-9  # of E4M3, subnormal
# Scales tried are these multiples of absmax / 6. 1.5 puts the largest weight at 4, below which steps are finer.
FACTORS = (1.0, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2, 1.35, 1.5)


class Nvfp4(Format):
    """compressed-tensors' `nvfp4-pack-quantized` without activations.

    The global scale is a power of two, so that scale / global scale and with it every value is exact, and all readers,
    whichever way round they divide, see the same bits. Layers that servers merge share it.
    """

    needs_weight_range = True

    def fault(self, shape: tuple[int, int]) -> str | None:
        return undivided(shape[1], GROUP, "groups of")

    def stored(self, shape: tuple[int, int]) -> dict[str, Header]:
        rows, columns = shape
        return {
            "weight_packed": (torch.uint8, (rows, columns // 2)),
            "weight_scale": (E4M3, (rows, columns // GROUP)),
            "weight_global_scale": (torch.float32, (1,)),
        }

    def compress(self, weight_NK: Tensor, ranges: Ranges) -> dict[str, Tensor]:
        factor = global_scale(ranges.weight_absmax)
        packed, scale_NG = by_rows(partial(_compress_rows, factor=factor), weight_NK)
        return {"weight_packed": packed, "weight_scale": scale_NG, "weight_global_scale": torch.tensor([factor])}

    def decompress(self, tensors: Mapping[str, Tensor]) -> Tensor:
        values_NGS = fp4.decode(fp4.unpack(tensors["weight_packed"])).unflatten(-1, (-1, GROUP))
        scale_NG = tensors["weight_scale"].float() / tensors["weight_global_scale"]
        return (values_NGS * scale_NG[..., None]).flatten(-2).to(torch.bfloat16)


def global_scale(absmax: float) -> float:
    """The largest power of two with which every scale fits into E4M3: at most 448 * 6 / absmax."""
    return 2.0 ** max(-60, min(60, floor(log2(LARGEST * 6 / absmax)))) if absmax > 0 else 1.0


def _compress_rows(weight_NK: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    weight_NGS = weight_NK.unflatten(-1, (-1, GROUP)) * factor
    full_NG = weight_NGS.abs().amax(-1) / 6
    candidates = [(full_NG * times).clamp(SMALLEST, LARGEST).to(E4M3).float() for times in FACTORS]
    scale_NG = fp4.best_scale(weight_NGS, candidates)
    return fp4.pack(fp4.encode(weight_NGS / scale_NG[..., None]).flatten(-2)), scale_NG.to(E4M3)
