"""95 % intervals by a seeded cluster bootstrap of ratios (nats per token, bits per byte, differences).

    interval = bootstrap_ratio(nats_G, tokens_G)        # one entry a document; interval.low, interval.high

Legend: G groups (documents) that are resampled together, N rows, R resamples.
"""

from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, stdtrit

CONFIDENCE = 0.95
RESAMPLES = 4000
_WEIGHTS_AT_ONCE = 4_000_000  # entries of the [resamples, groups] matrix that exist at one time


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Groups:
    """Which rows stand or fall together. `member_N[n]` is the group (0..count-1) of row n."""

    member_N: NDArray[np.int64]
    count: int

    def sum(self, values_N: ArrayLike) -> NDArray[np.float64]:
        """Per-group sums [G] of a per-row quantity [N]."""
        return np.bincount(self.member_N, weights=np.asarray(values_N, dtype=np.float64), minlength=self.count)


def group_rows(documents_N: ArrayLike) -> Groups:
    """Rows of one document form one group: neighbouring pieces of a text are not independent draws."""
    names, member_N = np.unique(np.asarray(documents_N), return_inverse=True)
    return Groups(member_N.reshape(-1).astype(np.int64), len(names))


def bootstrap_ratio(
    numerator_G: ArrayLike,
    denominator_G: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """Interval of sum(numerator) / sum(denominator) when the groups are a sample of many more.

    Expanded percentile bootstrap: the plain percentile interval is too narrow by about sqrt((G-1)/G) and the ratio of
    normal to t quantiles, so it is read at wider percentiles (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap", 4.3). The same seed draws the same groups, hence differences of paired columns are paired.
    None when there are fewer than two groups: one document says nothing about the spread between documents.
    """
    top_G = np.asarray(numerator_G, dtype=np.float64)
    bottom_G = np.asarray(denominator_G, dtype=np.float64)
    groups = len(top_G)
    if groups < 2:
        return None
    tail = ndtr(sqrt(groups / (groups - 1)) * stdtrit(groups - 1, (1 - confidence) / 2))
    ratios_R = _resampled_ratios(top_G, bottom_G, seed=seed, resamples=resamples)
    low, high = np.quantile(ratios_R, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _resampled_ratios(
    top_G: NDArray[np.float64], bottom_G: NDArray[np.float64], *, seed: int, resamples: int
) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    groups = len(top_G)
    share_G = np.full(groups, 1.0 / groups)
    at_once = max(1, _WEIGHTS_AT_ONCE // groups)
    ratios = []
    for start in range(0, resamples, at_once):
        draws_RG = generator.multinomial(groups, share_G, size=min(at_once, resamples - start)).astype(np.float64)
        ratios.append((draws_RG @ top_G) / (draws_RG @ bottom_G))
    return np.concatenate(ratios)
