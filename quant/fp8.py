"""FP8 E4M3: one scale per output channel for weights, one per token for activations.

    codes_NK, scale_N1 = quantise(weight_NK)          # weight ~ codes * scale, |codes| <= 448
    input_T_K = fake_quantise_tokens(input_T_K)       # what the activations become on the way into a layer

N output channels, K input channels; a token is everything but the last dimension.
"""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
SMALLEST = torch.finfo(torch.bfloat16).tiny


def quantise(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes [N, K] and bf16 scales [N, 1] of a finite matrix: absmax / 448, rounded, then codes from fp32.

    The division is done in fp32 with the stored scale; doing it in bf16 (as compressed-tensors does) rounds twice.
    A scale rounded down puts the largest weight at most 0.4 % above 448, where the clamp costs less than half a step.
    """
    weight_NK = weight_NK.float()
    scale_N1 = (weight_NK.abs().amax(-1, keepdim=True) / LARGEST).to(torch.bfloat16)
    scale_N1 = torch.where(scale_N1 < SMALLEST, torch.ones_like(scale_N1), scale_N1)
    codes_NK = (weight_NK / scale_N1.float()).clamp_(-LARGEST, LARGEST).to(E4M3)
    return codes_NK, scale_N1


def dequantise(codes_NK: Tensor, scale_N1: Tensor) -> Tensor:
    """bf16 weights [N, K]: an exact product, rounded once."""
    return codes_NK.to(scale_N1.dtype) * scale_N1


def fake_quantise_tokens(input: Tensor) -> Tensor:
    """Activations [..., K] rounded to E4M3 with one scale per token, in their own dtype.

    The arithmetic, including its roundings to the activations' dtype, is that of compressed-tensors' forward.
    """
    scale = input.abs().amax(-1, keepdim=True) / LARGEST
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    codes = (input / scale).clamp(-LARGEST, LARGEST).to(E4M3)
    return codes.to(input.dtype) * scale
