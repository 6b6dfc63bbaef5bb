"""In what order the rows of several sources come: by weight, evenly spread, any place computed on its own.

    source_R, place_R = Mixture([3.0, 1.0], seed=0).at(np.arange(8))     # which source, and its how many-th row

Suffix legend: R rows asked for, S sources.
"""

from collections.abc import Sequence

import numpy as np

from herd.data.permutation import shuffled

BLOCK = 1024
"""Rows within which every source has its share: weights are kept to one in so many."""


class Mixture:
    """Blocks of 1024 places, in each of which a source has the same number of rows, spread evenly.

    Row j of the n a source has in a block stands at (j + u) / n of it, u in [0, 1) drawn from seed, block and source;
    0 without a seed, so that the first rows are one of each source. With one source it is 0, 1, 2, ...
    """

    def __init__(self, weights: Sequence[float], *, seed: int | None) -> None:
        self.counts_S = apportion(weights, BLOCK)
        self._seed = seed

    def at(self, places_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source [R] and how many of its rows come before this one [R], int64, of these rows of the run."""
        source_R, place_R = (np.empty(len(places_R), dtype=np.int64) for _ in range(2))
        for block in np.unique(places_R // BLOCK).tolist():
            inside_R = places_R // BLOCK == block
            order, number = self._block(block)
            within = places_R[inside_R] % BLOCK
            source_R[inside_R] = order[within]
            place_R[inside_R] = block * self.counts_S[order[within]] + number[within]
        return source_R, place_R

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each place of a block [1024], and its number among that source's rows in the block."""
        source = np.repeat(np.arange(len(self.counts_S)), self.counts_S)
        number = np.concatenate([np.arange(count) for count in self.counts_S])
        phase_S = np.zeros(len(self.counts_S))
        if self._seed is not None:
            phase_S = np.array([_phase(self._seed, block, place) for place in range(len(self.counts_S))])
        order = np.argsort((number + phase_S[source]) / self.counts_S[source], kind="stable")
        return source[order], number[order]


def _phase(seed: int, block: int, source: int) -> float:
    """A number in [0, 1)."""
    return int(shuffled(np.zeros(1, dtype=np.int64), count=BLOCK, key=(seed, block, source))[0]) / BLOCK


def apportion(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers [S] that add up to `total`, at least one each, by largest remainders."""
    weights_S = np.asarray(weights, dtype=np.float64)
    exact_S = weights_S / weights_S.sum() * (total - len(weights_S))
    counts_S = np.floor(exact_S).astype(np.int64)
    short = total - len(weights_S) - int(counts_S.sum())
    counts_S[np.argsort(counts_S - exact_S, kind="stable")[:short]] += 1
    return counts_S + 1
