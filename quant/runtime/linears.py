"""Linear layers [N, K] for serving: no gradients, several layers over one input fused by rows, bf16 in and out.

    layer = Plain(weight_NK);  output_MN = layer.product(input_MK);  layer(input)      # any leading dimensions

Low-bit kinds are in int4.py, int8.py and fp8.py. M rows (tokens), N output channels, K input channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROW_STEP = 16  # oneDNN compiles a bf16 kernel for every new number of rows, about 1 ms each; routing makes many
TILE_ELEMENTS = 1 << 18  # weights unpacked at a time: as bf16, half a megabyte of second-level cache


class Linear(nn.Module):
    """What the kinds share; a kind gives `product`."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.out_features, self.in_features = rows, columns
        self.bias: Tensor | None = None

    def product(self, input_MK: Tensor) -> Tensor:
        """Input @ weight^T [M, N] without the bias."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        output_MN = self.product(input.reshape(-1, self.in_features))
        if self.bias is not None:
            output_MN += self.bias
        return output_MN.view(*input.shape[:-1], self.out_features)

    @property
    def packed_bytes(self) -> int:
        """Bytes the layer holds."""
        return sum(buffer.nbytes for buffer in self.buffers())


class Plain(Linear):
    """A bf16 weight."""

    def __init__(self, weight_NK: Tensor):
        super().__init__(*weight_NK.shape)
        self.weight = nn.Buffer(weight_NK, persistent=False)

    def product(self, input_MK: Tensor) -> Tensor:
        return multiply(input_MK, self.weight)


def multiply(input_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """Input @ weight^T [M, N] of bf16 matrices; one row goes through torch's faster matrix-vector product."""
    if len(input_MK) == 1:
        return torch.mv(weight_NK, input_MK[0])[None]
    return F.linear(pad_rows(input_MK), weight_NK)[: len(input_MK)]


def pad_rows(input_MK: Tensor) -> Tensor:
    """Rows of zeros added up to a multiple of ROW_STEP."""
    return F.pad(input_MK, (0, 0, 0, -len(input_MK) % ROW_STEP))
