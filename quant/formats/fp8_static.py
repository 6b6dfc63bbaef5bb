"""FP8 E4M3 with one scale a tensor, for weights and for activations alike; that of the activations is calibrated.

    tensors = Fp8Static().compress(weight_NK, Ranges(weight_absmax=0.31, input_absmax=12.5))

The magnitudes are those of all layers that servers merge, so that none of them is rounded a second time on loading.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from quant.formats.format import Format, Header, Ranges
from quant.formats.fp8 import E4M3, encode, fake_quantise, scale_for


class Fp8Static(Format):
    """compressed-tensors' `float-quantized`, strategy `tensor` for both."""

    needs_weight_range = True
    needs_input_range = True

    def fault(self, shape: tuple[int, int]) -> str | None:
        return None

    def stored(self, shape: tuple[int, int]) -> dict[str, Header]:
        one = (torch.bfloat16, (1,))
        return {"weight": (E4M3, shape), "weight_scale": one, "input_scale": one}

    def compress(self, weight_NK: Tensor, ranges: Ranges) -> dict[str, Tensor]:
        scale, input_scale = (
            scale_for(torch.tensor([absmax])) for absmax in (ranges.weight_absmax, ranges.input_absmax)
        )
        return {"weight": encode(weight_NK, scale), "weight_scale": scale, "input_scale": input_scale}

    def decompress(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"].to(torch.bfloat16) * tensors["weight_scale"]

    def input_rounding(self, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return partial(fake_quantise, scale=tensors["input_scale"])
