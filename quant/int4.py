"""Int4, symmetric, one bf16 scale per group of weights: round to nearest with a searched scale; packing.

    codes_NK, scale_NG = quantise(weight_NK, group_size)       # weight ~ codes * scale, codes in [-8, 7]
    packed = pack(codes_NK);  codes_NK = unpack(packed, K)     # compressed-tensors `pack-quantized` words

N output channels, K input channels, G groups of a row, M groups of the whole matrix, S weights in a group.
"""

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from torch import Tensor

LOWEST, HIGHEST = -8, 7
GROUP_SIZES = (32, 64, 128)

# Candidate scales are these multiples of absmax / 7.5, with either sign. 1 is compressed-tensors' own recipe, 7.5 / 8
# Meta's (absmax / 8). A negative scale gives a group whose largest weight is positive the code -8 for it: the same
# bits on disk, and nothing clipped.
SHRINKS = (1.0, 7.5 / 8, 0.8, 0.84, 0.88, 0.91, 0.97, 1.03, 1.07)
REFINEMENTS = 2
CHUNK_ELEMENTS = 1 << 17  # the working set of the search stays in the second-level cache
SMALLEST = torch.finfo(torch.bfloat16).tiny


def quantise(weight_NK: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and scales bf16 [N, K / group_size] of a finite matrix, K divisible by the group size."""
    rows, columns = weight_NK.shape
    weight_MS = weight_NK.reshape(-1, group_size)
    codes_MS = torch.empty(weight_MS.shape, dtype=torch.int8)
    scale_M = torch.empty(len(weight_MS), dtype=torch.bfloat16)
    step = max(1, CHUNK_ELEMENTS // group_size)
    for start in range(0, len(weight_MS), step):
        chunk = slice(start, start + step)
        chunk_MS = weight_MS[chunk].float()
        found_M = search_scale(chunk_MS)
        scale_M[chunk] = found_M.to(torch.bfloat16)
        codes_MS[chunk] = encode(chunk_MS, found_M).to(torch.int8)
    return codes_MS.view(rows, columns), scale_M.view(rows, columns // group_size)


def search_scale(weight_MS: Tensor) -> Tensor:
    """The scale of each group, fp32 [M] exactly representable in bf16, with the least sum of its errors' fourth powers.

    Every candidate is rounded to bf16 before its errors are taken, and counts only if its squared error is no larger
    than that of absmax / 7.5 and of absmax / 8. Fourth powers, because clipping the largest weights, which squares are
    content with, costs more KL than it saves (docs/quantisation.md). The winner is refined: for fixed codes q the scale
    that minimises sum (w - s q)^4 solves a least-squares problem with weights (w - s q)^2; kept where it is better.
    """
    # In units of a power of two near the group's largest weight, which rounds alike and cannot overflow.
    absmax_M = weight_MS.abs().amax(-1)
    unit_M = torch.ldexp(torch.ones_like(absmax_M), torch.frexp(absmax_M).exponent.clamp(-100, 127))
    weight_MS = weight_MS / unit_M[:, None]
    full_M = absmax_M / unit_M / 7.5
    best_M = _storable(full_M)
    limit_M = torch.minimum(errors(weight_MS, best_M)[0], errors(weight_MS, _storable(full_M * (7.5 / 8)))[0])
    least_M = torch.full_like(full_M, torch.inf)
    for shrink in SHRINKS:
        for sign in (1.0, -1.0):
            best_M, least_M = _better(weight_MS, best_M, least_M, limit_M, full_M * (sign * shrink))
    for _ in range(REFINEMENTS):
        codes_MS = encode(weight_MS, best_M)
        weighted_MS = codes_MS * (codes_MS * best_M[:, None] - weight_MS).square_()
        fitted_M = (weighted_MS * weight_MS).sum(-1) / (weighted_MS * codes_MS).sum(-1).clamp_(min=SMALLEST)
        best_M, least_M = _better(weight_MS, best_M, least_M, limit_M, fitted_M)
    return torch.where(absmax_M == 0, 1.0, _storable(best_M * unit_M))


def encode(weight_MS: Tensor, scale_M: Tensor) -> Tensor:
    """Nearest codes, as floats, ties to even: clamp(round(w / s), -8, 7)."""
    return (weight_MS / scale_M[:, None]).round_().clamp_(LOWEST, HIGHEST)


def errors(weight_MS: Tensor, scale_M: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over each group of (w - s q)^2 and of (w - s q)^4, both [M], when it is rounded with its scale."""
    square_MS = encode(weight_MS, scale_M).mul_(scale_M[:, None]).sub_(weight_MS).square_()
    return square_MS.sum(-1), square_MS.square().sum(-1)


def dequantise(codes_NK: Tensor, scale_NG: Tensor) -> Tensor:
    """bf16 weights [N, K]: one exact product, rounded once to bf16, as every reader of the format does."""
    rows, columns = codes_NK.shape
    groups = scale_NG.shape[-1]
    codes_NGS = codes_NK.view(rows, groups, columns // groups).to(scale_NG.dtype)
    return (codes_NGS * scale_NG[:, :, None]).view(rows, columns)


def pack(codes_NK: Tensor) -> Tensor:
    """int32 words [N, ceil(K / 8)]: element i of a row in bits 4 (i % 8) of word i // 8, stored as code + 8."""
    return pack_to_int32(codes_NK, 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`: int8 codes [N, columns]."""
    return unpack_from_int32(packed, 4, torch.Size((packed.shape[0], columns)))


def _storable(scale_M: Tensor) -> Tensor:
    """Rounded to bf16, kept away from zero and from subnormals (a group that small becomes zeros)."""
    rounded_M = scale_M.to(torch.bfloat16).float()
    return torch.where(rounded_M.abs() < SMALLEST, SMALLEST, rounded_M)


def _better(
    weight_MS: Tensor, best_M: Tensor, least_M: Tensor, limit_M: Tensor, candidate_M: Tensor
) -> tuple[Tensor, Tensor]:
    """The best scale and its fourth-power error after one more candidate."""
    candidate_M = _storable(candidate_M)
    square_M, fourth_M = errors(weight_MS, candidate_M)
    wins_M = (fourth_M < least_M) & (square_M <= limit_M)
    return torch.where(wins_M, candidate_M, best_M), torch.where(wins_M, fourth_M, least_M)
