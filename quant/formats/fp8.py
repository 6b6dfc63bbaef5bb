"""FP8 E4M3 with one scale per output channel for weights and one per token for activations; shared arithmetic.

    tensors = Fp8().compress(weight_NK, Ranges())     # weight ~ codes * scale, |codes| <= 448
    input = fake_quantise(input, scale)               # what activations become on the way into a layer

N output channels, K input channels; a token is everything but the last dimension.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quant.formats.format import Format, Header, Ranges

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
SMALLEST = torch.finfo(torch.bfloat16).tiny


class Fp8(Format):
    """compressed-tensors' `float-quantized`, dynamic per-token activations."""

    def fault(self, shape: tuple[int, int]) -> str | None:
        return None

    def stored(self, shape: tuple[int, int]) -> dict[str, Header]:
        return {"weight": (E4M3, shape), "weight_scale": (torch.bfloat16, (shape[0], 1))}

    def compress(self, weight_NK: Tensor, ranges: Ranges) -> dict[str, Tensor]:
        scale_N1 = scale_for(weight_NK.abs().amax(-1, keepdim=True))
        return {"weight": encode(weight_NK, scale_N1), "weight_scale": scale_N1}

    def decompress(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"].to(torch.bfloat16) * tensors["weight_scale"]

    def input_rounding(self, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return fake_quantise_tokens


def scale_for(absmax: Tensor) -> Tensor:
    """The bf16 scale that puts the largest magnitude at 448: absmax / 448, rounded."""
    scale = (absmax.float() / LARGEST).to(torch.bfloat16)
    return torch.where(scale < SMALLEST, torch.ones_like(scale), scale)


def encode(weight: Tensor, scale: Tensor) -> Tensor:
    """E4M3 codes of finite weights; the scale broadcasts.

    The division is done in fp32 with the stored scale; doing it in bf16 (as compressed-tensors does) rounds twice.
    A scale rounded down puts the largest weight at most 0.4 % above 448, where the clamp costs less than half a step.
    """
    return (weight.float() / scale.float()).clamp_(-LARGEST, LARGEST).to(E4M3)


def fake_quantise(input: Tensor, scale: Tensor) -> Tensor:
    """Activations rounded to E4M3 times a scale, in their own dtype.

    The arithmetic, including its roundings to the activations' dtype, is that of compressed-tensors' forward.
    """
    return (input / scale).clamp(-LARGEST, LARGEST).to(E4M3).to(input.dtype) * scale


def dynamic_scale(input: Tensor) -> Tensor:
    """One scale for each row of the last dimension, kept as a dimension of 1."""
    scale = input.abs().amax(-1, keepdim=True) / LARGEST
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def fake_quantise_tokens(input: Tensor) -> Tensor:
    """Activations [..., K] rounded with one scale per token."""
    return fake_quantise(input, dynamic_scale(input))
