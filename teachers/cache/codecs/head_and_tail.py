"""Large masses kept, small ones sampled: threshold sampling with one threshold for a block of tokens.

A class of mass p above its token's threshold s is kept; of the others as many as r / s (r their mass together) are
drawn systematically and share r. Unbiased, sums to one, a fixed mean number of classes, and the least
E||t - p||^2 any unbiased sample of that size has: s r - sum of tail p^2, summed over tokens.
Suffix legend: C tokens, K the largest classes looked at, G thresholds tried.
"""

from dataclasses import dataclass
from math import ceil, log2
from typing import ClassVar

import numpy as np
import torch

from teachers.cache.codecs.distributions import Distributions
from teachers.cache.codecs.picks import Picks
from teachers.cache.codecs.rounding import round_to_units
from teachers.targets import Tail

SPREAD = 4
"""A token gets at most this many times the mean number of classes."""
UNITS_A_THRESHOLD = 2
"""Finer units cost bits that more classes would use better; this is the flat bottom of that trade."""
LEAST_UNITS, MOST_UNITS = 8, 1 << 15
LOWEST_THRESHOLD = 1e-6
TRIED, ROUNDS = 16, 5


@dataclass(frozen=True)
class HeadAndTail:
    """`size` is the mean number of classes a token keeps; flat distributions get more of them than peaked ones."""

    size: int
    name: ClassVar[str] = "head_and_tail"
    tail: ClassVar[Tail] = "sampled"
    uniforms: ClassVar[int] = 2

    def pick(self, chunk: Distributions, uniforms_CP: np.ndarray) -> Picks:
        """Choose for every token of a block."""
        device = chunk.mass_CS.device
        u_PC = torch.from_numpy(uniforms_CP.T.copy()).to(device)
        most = min(SPREAD * self.size, chunk.probs_CSs[0].numel())
        values_CK, ids_CK = chunk.largest(most)
        chunk.take_out(ids_CK)
        below_CK = _mass_from(values_CK, chunk.mass_CS.sum(-1))
        threshold, counts_C = allocate(values_CK, below_CK, mean=self.size)
        heads_C = split_heads(values_CK, below_CK, counts_C)
        is_head_CK = torch.arange(most, device=device) < heads_C[:, None]
        chunk.put_back(ids_CK, values_CK.masked_fill(is_head_CK, 0.0))

        total = units_of(threshold)
        rest_C1 = below_CK.gather(1, heads_C[:, None])
        parts_CK = torch.cat([values_CK * is_head_CK, rest_C1], 1)
        units_CK = round_to_units(parts_CK, total=total, uniforms_C=u_PC[0])
        drawn_C = torch.where(units_CK[:, -1] > 0, counts_C - heads_C, 0)
        places_K = torch.arange(int(drawn_C.max().clamp_min(1)), device=device)
        points_CK = (places_K + u_PC[1][:, None]) / drawn_C.clamp_min(1)[:, None]
        sampled_CK = chunk.at(points_CK.clamp_max(1.0))
        return Picks.own_and_sampled(units_CK[:, :-1], ids_CK, sampled_CK, places_K < drawn_C[:, None], total=total)


def units_of(threshold: float) -> int:
    """How many parts a token's mass is counted in."""
    return min(MOST_UNITS, max(LEAST_UNITS, ceil(UNITS_A_THRESHOLD / threshold)))


def allocate(values_CK: torch.Tensor, below_CK: torch.Tensor, *, mean: int) -> tuple[float, torch.Tensor]:
    """The smallest threshold at which a block keeps at most mean * C classes, and how many each token gets then.

    A common threshold is the best split: the derivative of a token's squared error by its classes is minus its
    threshold squared. `below_CK` [C, K + 1]: mass from each place on.
    """
    low, high = LOWEST_THRESHOLD, 1.0
    for _ in range(ROUNDS):
        tried_G = torch.logspace(log2(low), log2(high), TRIED, base=2, dtype=torch.float64, device=values_CK.device)
        counts_CG, expected_G = _counts(values_CK, below_CK, tried_G)
        fits = min(int((expected_G > mean * len(values_CK)).sum()), TRIED - 1)  # the first that fits; the last does
        above = max(fits - 1, 0)
        low, high = float(tried_G[above]), float(tried_G[fits])
    # Alike tokens cross a whole number at one threshold; what is left goes to as many of them as it is enough for.
    spare = int(mean * len(values_CK) - expected_G[fits])
    wanted_C = counts_CG[:, above] - counts_CG[:, fits]
    given_C = torch.minimum(wanted_C, (spare - wanted_C.cumsum(0) + wanted_C).clamp_min(0))
    return high, counts_CG[:, fits] + given_C


def _counts(
    values_CK: torch.Tensor, below_CK: torch.Tensor, thresholds_G: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes each token gets at each threshold [C, G]: its heads, and one for each threshold's worth of the rest.

    And how many a block is expected to keep [G]: a rest of less than a unit is most often rounded to none.
    """
    sought_CG = -thresholds_G.expand(len(values_CK), -1).contiguous()
    heads_CG = torch.searchsorted(-values_CK, sought_CG, right=True)
    rest_CG = below_CK.gather(1, heads_CG)
    counts_CG = (heads_CG + torch.ceil(rest_CG / thresholds_G).long()).clamp(1, values_CK.shape[1])
    units_G = thresholds_G.new_tensor([units_of(threshold) for threshold in thresholds_G.tolist()])
    never_CG = (1 - rest_CG * units_G).clamp_min(0)
    return counts_CG, (counts_CG - (counts_CG - heads_CG) * never_CG).sum(0)


def split_heads(values_CK: torch.Tensor, below_CK: torch.Tensor, counts_C: torch.Tensor) -> torch.Tensor:
    """The fewest classes to keep exactly so that no other is larger than its sample's share of the rest."""
    places_K = torch.arange(values_CK.shape[1], device=values_CK.device)
    left_CK = counts_C[:, None] - places_K
    share_CK = below_CK[:, :-1] / left_CK.clamp_min(1)
    enough_CK = (values_CK <= share_CK) & (left_CK > 0)
    return enough_CK.long().argmax(-1)


def _mass_from(values_CK: torch.Tensor, rest_C: torch.Tensor) -> torch.Tensor:
    """Mass of the classes from each place on [C, K + 1], the last without any of the K."""
    from_CK = values_CK.flip(-1).cumsum(-1).flip(-1) + rest_C[:, None]
    return torch.cat([from_CK, rest_C[:, None]], 1)
