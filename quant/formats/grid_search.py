"""The scale (and zero) of each group of weights with which rounding to nearest does least harm.

    scale_M, zero_M = search_groups(weight_MS, None, bits=4, symmetric=True)

M groups, S weights in a group, G groups of a row (group m is number m % G of its row).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Symmetric: scales tried are these multiples of absmax / 7.5 (of absmax / 127.5 with 8 bits). 1 is compressed-tensors'
# own recipe, 7.5 / 8 Meta's.
SHRINKS = (1.0, 7.5 / 8, 0.8, 0.84, 0.88, 0.91, 0.97, 1.03, 1.07)
# With 4 bits of either sign: a negative scale gives a group whose largest weight is positive the code -8 for it, so
# that nothing is clipped. With 8 bits that is worth nothing.
SIGNS = {4: (1.0, -1.0), 8: (1.0,)}
# Asymmetric: the range tried spans these shares of the smallest and of the largest weight.
ENDS = (1.0, 0.95, 0.9, 0.85, 0.8)
REFINEMENTS = 2
CHUNK_ELEMENTS = 1 << 17  # the working set of the search stays in the second-level cache
THREAD_ELEMENTS = 1 << 15  # torch gives a thread no fewer of an operation
SMALLEST = torch.finfo(torch.bfloat16).tiny


@dataclass(frozen=True)
class Rounding:
    """Groups of weights that are rounded to a grid of `bits`, and how much each error counts."""

    weight_MS: Tensor
    importance_MS: Tensor | None
    bits: int

    def codes(self, scale_M: Tensor, zero_M: Tensor | None) -> Tensor:
        """The nearest codes less their zero, as floats [M, S]."""
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        ratio_MS = self.weight_MS * scale_M.reciprocal()[:, None]
        if zero_M is None:
            return ratio_MS.round_().clamp_(low, high)
        zero_M1 = zero_M[:, None]
        return (ratio_MS + zero_M1).round_().clamp_(low, high).sub_(zero_M1)

    def errors(self, scale_M: Tensor, zero_M: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sums over each group of (w - s (q - z))^2 and of its square, times the importance; both [M]."""
        square_MS = self.codes(scale_M, zero_M).mul_(scale_M[:, None]).sub_(self.weight_MS).square_()
        counted_MS = square_MS if self.importance_MS is None else square_MS * self.importance_MS
        return counted_MS.sum(-1), counted_MS.mul_(square_MS).sum(-1)

    def fit(self, scale_M: Tensor, zero_M: Tensor | None) -> Tensor:
        """The scale that, for the codes q of this one, minimises the sum of (w - s (q - z))^4.

        It solves a least-squares problem with weights (w - s (q - z))^2.
        """
        codes_MS = self.codes(scale_M, zero_M)
        weighted_MS = codes_MS * (codes_MS * scale_M[:, None] - self.weight_MS).square_()
        if self.importance_MS is not None:
            weighted_MS *= self.importance_MS
        return (weighted_MS * self.weight_MS).sum(-1) / (weighted_MS * codes_MS).sum(-1).clamp_(min=SMALLEST)


def search_groups(
    weight_MS: Tensor, importance_GS: Tensor | None, *, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Scales, fp32 [M] exactly representable in bf16, and zeros, int8 [M] (None when symmetric), of finite groups.

    Least is the sum over a group of its errors' fourth powers. Every candidate is rounded to bf16 before its errors
    are taken, and counts only if its squared error is no larger than that of the plain recipes (symmetric: absmax over
    7.5 and over 8; asymmetric: the full range). Fourth powers, because clipping the largest weights, which squares are
    content with, costs more KL than it saves (docs/quantisation.md). The winner's scale is then refined.
    """
    groups, size = weight_MS.shape
    scale_M = torch.empty(groups)
    zero_M = None if symmetric else torch.empty(groups, dtype=torch.int8)
    step = max(1, max(CHUNK_ELEMENTS, THREAD_ELEMENTS * torch.get_num_threads()) // size)
    for start in range(0, groups, step):
        chunk = slice(start, min(start + step, groups))
        chunk_MS = weight_MS[chunk].float()
        importance_MS = None
        if importance_GS is not None:
            importance_MS = importance_GS[torch.arange(chunk.start, chunk.stop) % len(importance_GS)]
        if symmetric:
            scale_M[chunk] = _search_symmetric(chunk_MS, importance_MS, bits)
        else:
            scale_M[chunk], zero_M[chunk] = _search_asymmetric(chunk_MS, importance_MS, bits)
    return scale_M, zero_M


def _search_symmetric(weight_MS: Tensor, importance_MS: Tensor | None, bits: int) -> Tensor:
    unit_M, absmax_M = _unit(weight_MS)
    rounding = Rounding(weight_MS / unit_M[:, None], importance_MS, bits)
    half = 2 ** (bits - 1)
    full_M = absmax_M / unit_M / (half - 0.5)
    best_M = storable(full_M)
    limit_M = torch.minimum(
        rounding.errors(best_M)[0], rounding.errors(storable(full_M * ((half - 0.5) / half)))[0]
    )  # fmt: skip
    least_M = torch.full_like(full_M, torch.inf)
    for shrink in SHRINKS:
        for sign in SIGNS[bits]:
            best_M, least_M = _better(rounding, best_M, least_M, limit_M, full_M * (sign * shrink))
    for _ in range(REFINEMENTS):
        best_M, least_M = _better(rounding, best_M, least_M, limit_M, rounding.fit(best_M, None))
    return torch.where(absmax_M == 0, 1.0, storable(best_M * unit_M))


def _better(
    rounding: Rounding, best_M: Tensor, least_M: Tensor, limit_M: Tensor, candidate_M: Tensor
) -> tuple[Tensor, Tensor]:
    """The best scale and its fourth-power error after one more candidate."""
    candidate_M = storable(candidate_M)
    square_M, fourth_M = rounding.errors(candidate_M)
    wins_M = (fourth_M < least_M) & (square_M <= limit_M)
    return torch.where(wins_M, candidate_M, best_M), torch.where(wins_M, fourth_M, least_M)


def _search_asymmetric(weight_MS: Tensor, importance_MS: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    # The range always holds 0, or the zero would not fit into the range of the codes.
    unit_M, absmax_M = _unit(weight_MS)
    rounding = Rounding(weight_MS / unit_M[:, None], importance_MS, bits)
    low_M = rounding.weight_MS.amin(-1).clamp(max=0)
    high_M = rounding.weight_MS.amax(-1).clamp(min=0)
    best_M, zero_M = _spanning(low_M, high_M, bits)
    limit_M, least_M = rounding.errors(best_M, zero_M)
    candidates = [_spanning(low_M * low, high_M * high, bits) for low in ENDS for high in ENDS]
    for step in range(len(candidates) + REFINEMENTS):
        fitted = step >= len(candidates)
        scale_M, at_M = (storable(rounding.fit(best_M, zero_M)), zero_M) if fitted else candidates[step]
        square_M, fourth_M = rounding.errors(scale_M, at_M)
        wins_M = (fourth_M < least_M) & (square_M <= limit_M)
        best_M, zero_M = torch.where(wins_M, scale_M, best_M), torch.where(wins_M, at_M, zero_M)
        least_M = torch.where(wins_M, fourth_M, least_M)
    empty_M = absmax_M == 0
    return torch.where(empty_M, 1.0, storable(best_M * unit_M)), torch.where(empty_M, 0.0, zero_M).to(torch.int8)


def _spanning(low_M: Tensor, high_M: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The stored scale and the zero of a grid from low to high."""
    scale_M = storable((high_M - low_M) / (2**bits - 1))
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return scale_M, (lowest - low_M / scale_M).round_().clamp_(lowest, highest)


def _unit(weight_MS: Tensor) -> tuple[Tensor, Tensor]:
    """A power of two near each group's largest weight, in units of which nothing overflows; and that weight's size."""
    absmax_M = weight_MS.abs().amax(-1)
    return torch.ldexp(torch.ones_like(absmax_M), torch.frexp(absmax_M).exponent.clamp(-100, 127)), absmax_M


def storable(scale_M: Tensor) -> Tensor:
    """Rounded to bf16, kept away from zero and from subnormals (a group that small becomes zeros)."""
    rounded_M = scale_M.to(torch.bfloat16).float()
    return torch.where(rounded_M.abs() < SMALLEST, SMALLEST, rounded_M)
