"""FP4 E2M1, the element of MXFP4 and NVFP4: sign, two bits of exponent, one of mantissa, two elements a byte.

    codes = encode(values);  values = decode(codes);  packed = pack(codes_NK);  codes_NK = unpack(packed)

N output channels, K input channels, G groups of a row, S weights in a group.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode(values: Tensor) -> Tensor:
    """The nearest codes (uint8, 0 .. 15: sign bit, then index of the magnitude), ties to the even mantissa."""
    size = values.abs()
    codes = (size > 0.25).to(torch.uint8)
    for bound, tie_goes_up in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        codes += (size >= bound) if tie_goes_up else (size > bound)
    return codes | ((values < 0).to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """The fp32 values of codes."""
    table = torch.tensor([*MAGNITUDES, *(-size for size in MAGNITUDES)])
    return table[codes.long()]


def pack(codes_NK: Tensor) -> Tensor:
    """Bytes [N, K / 2], the first element of each pair in the low half."""
    return codes_NK[:, ::2] | (codes_NK[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def best_scale(weight_NGS: Tensor, candidates: Iterable[Tensor]) -> Tensor:
    """Of several scales [N, G] for each group the one with the least sum of its errors' fourth powers.

    Only scales with no larger squared error than the first one count; see `grid_search` for why.
    """
    best_NG = least_NG = limit_NG = None
    for scale_NG in candidates:
        error_NGS = (decode(encode(weight_NGS / scale_NG[..., None])) * scale_NG[..., None] - weight_NGS).square_()
        square_NG, fourth_NG = error_NGS.sum(-1), error_NGS.square().sum(-1)
        if best_NG is None:
            best_NG, least_NG, limit_NG = scale_NG, fourth_NG, square_NG
            continue
        wins_NG = (fourth_NG < least_NG) & (square_NG <= limit_NG)
        best_NG, least_NG = torch.where(wins_NG, scale_NG, best_NG), torch.where(wins_NG, fourth_NG, least_NG)
    return best_NG
