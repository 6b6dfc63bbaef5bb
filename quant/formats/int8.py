"""W8A8: int8 weights with one scale a channel, activations rounded to int8 with one scale a token at run time.

    tensors = Int8().compress(weight_NK, Ranges())        # {"weight" int8, "weight_scale"}

N output channels, K input channels; a token is everything but the last dimension.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quant.formats.format import Format, Header, Ranges
from quant.formats.grid import Grid, Parameters


class Int8(Format):
    """compressed-tensors' `int-quantized`."""

    grid = Grid(bits=8, symmetric=True, group_size=None)

    def fault(self, shape: tuple[int, int]) -> str | None:
        return None

    def stored(self, shape: tuple[int, int]) -> dict[str, Header]:
        return {"weight": (torch.int8, shape), "weight_scale": (torch.bfloat16, (shape[0], 1))}

    def compress(self, weight_NK: Tensor, ranges: Ranges) -> dict[str, Tensor]:
        parameters = self.grid.search(weight_NK)
        return self.store(self.grid.encode(weight_NK, parameters), parameters)

    def store(self, codes_NK: Tensor, parameters: Parameters) -> dict[str, Tensor]:
        """Codes and parameters, however they were found, as stored tensors."""
        return {"weight": codes_NK, "weight_scale": parameters.scale_NG.to(torch.bfloat16)}

    def decompress(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.grid.decode(tensors["weight"], Parameters(tensors["weight_scale"].float()))

    def input_rounding(self, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return fake_quantise_tokens


def fake_quantise_tokens(input: Tensor) -> Tensor:
    """Activations [..., K] rounded to int8 with one scale per token, in their own dtype.

    The arithmetic, including its roundings to the activations' dtype, is that of compressed-tensors' forward.
    """
    scale = input.abs().amax(-1, keepdim=True) / 127.5
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return (input / scale).clamp(-128, 127).round() * scale
