"""NF4 in bitsandbytes' layout, plain or with its scales quantised once more ("double quantisation").

    tensors = Nf4(double=True).compress(weight_NK, Ranges())       # {"weight", "weight.absmax", ...}

Written from canonical tensors: bitsandbytes' own saving breaks once a model has run on a CPU.
N output channels, K input channels, B blocks of 64 weights (row by row), C blocks of 256 scales, S in a block.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats.format import Format, Header, Ranges, by_rows, undivided

BLOCK, SCALES_BLOCK = 64, 256
# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (Dettmers et al. 2023, appendix E).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
STATE = "weight.quant_state.bitsandbytes__nf4"
OFFSET_DIGITS = 26  # the longest JSON number


@dataclass(frozen=True)
class Nf4(Format):
    double: bool = False

    def fault(self, shape: tuple[int, int]) -> str | None:
        return undivided(shape[1], BLOCK, "blocks of")

    def stored(self, shape: tuple[int, int]) -> dict[str, Header]:
        blocks = shape[0] * shape[1] // BLOCK
        headers: dict[str, Header] = {
            "weight": (torch.uint8, (blocks * BLOCK // 2, 1)),
            "weight.absmax": (torch.uint8 if self.double else torch.float32, (blocks,)),
            "weight.quant_map": (torch.float32, (16,)),
        }
        if self.double:
            headers["weight.nested_absmax"] = (torch.float32, (-(-blocks // SCALES_BLOCK),))
            headers["weight.nested_quant_map"] = (torch.float32, (256,))
        headers[STATE] = (torch.uint8, (len(self._state(shape, 0.0)),))
        return headers

    def compress(self, weight_NK: Tensor, ranges: Ranges) -> dict[str, Tensor]:
        packed, absmax_B = by_rows(_compress_rows, weight_NK.to(torch.bfloat16))
        tensors = {"weight": packed[:, None], "weight.absmax": absmax_B, "weight.quant_map": torch.tensor(LEVELS)}
        offset = 0.0
        if self.double:
            mean = absmax_B.mean()
            offset = mean.item()
            codes_B, nested_C = quantise_scales(absmax_B - mean)
            tensors |= {
                "weight.absmax": codes_B,
                "weight.nested_absmax": nested_C,
                "weight.nested_quant_map": dynamic_map(),
            }
        state = self._state(tuple(weight_NK.shape), offset)
        return tensors | {STATE: torch.frombuffer(bytearray(state), dtype=torch.uint8)}

    def decompress(self, tensors: Mapping[str, Tensor]) -> Tensor:
        state = json.loads(bytes(tensors[STATE].tolist()))
        absmax_B = tensors["weight.absmax"]
        if self.double:
            nested_B = tensors["weight.nested_absmax"].repeat_interleave(SCALES_BLOCK)[: len(absmax_B)]
            absmax_B = tensors["weight.nested_quant_map"][absmax_B.long()] * nested_B + state["nested_offset"]
        packed = tensors["weight"].flatten()
        codes = torch.stack([packed >> 4, packed & 15], -1).view(-1, BLOCK)
        values = tensors["weight.quant_map"][codes.long()] * absmax_B[:, None]
        return values.to(torch.bfloat16).view(state["shape"])

    def _state(self, shape: tuple[int, int], offset: float) -> bytes:
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(shape)}
        if not self.double:
            return json.dumps(state).encode()
        state |= {"nested_blocksize": SCALES_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        # Padded, so that the length is known before the offset is; readers skip white space after JSON.
        padding = OFFSET_DIGITS - len(json.dumps(offset))
        return (json.dumps(state) + " " * padding).encode()


def quantise_scales(scale_B: Tensor) -> tuple[Tensor, Tensor]:
    """bitsandbytes' 8-bit dynamic quantisation: codes uint8 [B], and the largest magnitude of each 256 [C].

    Codes are the nearest; bitsandbytes' CPU kernel misses 15 in 10 000, close to a tie. A block of zeros has code 0.
    """
    blocks = -(-len(scale_B) // SCALES_BLOCK)
    padded_CS = torch.nn.functional.pad(scale_B, (0, blocks * SCALES_BLOCK - len(scale_B))).view(blocks, -1)
    absmax_C = padded_CS.abs().amax(-1)
    share_CS = torch.where(absmax_C[:, None] == 0, -1.0, padded_CS / absmax_C[:, None])
    levels = dynamic_map()
    below = (torch.searchsorted(levels, share_CS, right=True) - 1).clamp(0, 255)
    above = (below + 1).clamp(max=255)
    nearer = (levels[above] - share_CS).abs() < (share_CS - levels[below]).abs()
    return torch.where(nearer, above, below).flatten()[: len(scale_B)].to(torch.uint8), absmax_C


def dynamic_map() -> Tensor:
    """The 256 levels of bitsandbytes' signed dynamic type, ascending: a power of ten, then a linear fraction."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / 2.0
        for sign in (1, -1):
            levels += (sign * 10 ** (exponent - 6) * means).tolist()
    return torch.tensor(sorted(levels))


def _compress_rows(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    weight_BS = weight_NK.view(-1, BLOCK)
    absmax_B = weight_BS.abs().amax(-1)
    levels = torch.tensor(LEVELS)
    share_BS = (weight_BS * (1.0 / absmax_B.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    codes = torch.bucketize(share_BS, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten()
    return (codes[::2] << 4) | codes[1::2], absmax_B
