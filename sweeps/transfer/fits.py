"""From losses to claims: where the best rate lies, how it moves with size, and what carrying it over costs.

finding = read_grid(settings, "width", curves, ruled=True)
finding.slope, finding.interval, finding.moved, finding.excess

Suffixes: R rates, N points of a regression (one a seed and size).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from sweeps.transfer.coordinates import Coordinate
from sweeps.transfer.grids import Curve
from sweeps.transfer.settings import GRID_STEP, Along

CONFIDENCE = 0.95
AROUND = 2  # rungs on either side of the best that a parabola is laid through


@dataclass(frozen=True)
class Slope:
    """Of log2 y over log2 size, all seeds together, each with a level of its own."""

    value: float
    interval: tuple[float, float] | None
    """95 %, by Student's t; None where there are too few points."""


@dataclass(frozen=True)
class SizeFinding:
    factor: int
    best: float
    """The base's rate of the lowest mean loss, on the grid."""
    fitted: float
    """The same from a parabola through the mean losses around it."""
    by_seed: tuple[float, ...]
    """`fitted` of every seed."""
    retuned: float
    """Lowest mean loss."""
    carried: float
    """Mean loss at the rate that was best at the base."""
    enclosed: bool
    """There are higher losses on both sides of the best."""


@dataclass(frozen=True)
class GridFinding:
    along: Along
    ruled: bool
    sizes: tuple[SizeFinding, ...]
    slope: Slope
    """Of the best rate: 0 where the settings hold as they are."""

    @property
    def moved(self) -> float:
        """Most that the fitted best rate lies from the base's, in grid steps."""
        base = self.sizes[0].fitted
        return max(abs(math.log2(size.fitted / base)) for size in self.sizes[1:]) / GRID_STEP

    @property
    def excess(self) -> float:
        """Most that carrying the rate over costs, as a share of the re-tuned loss."""
        return max(size.carried / size.retuned - 1 for size in self.sizes[1:])


@dataclass(frozen=True)
class Flatness:
    along: Along
    ruled: bool
    kind: str
    means: dict[int, float]
    """Mean |x| after the last step by factor, over the seeds."""
    slope: Slope

    @property
    def ratio(self) -> float:
        """Largest over smallest."""
        return max(self.means.values()) / min(self.means.values())


def read_grid(curves: Sequence[Curve], *, along: Along, ruled: bool) -> GridFinding:
    """What the curves of one direction and parametrisation say, the base first."""
    mine = [curve for curve in curves if (curve.along, curve.ruled) == (along, ruled)]
    sizes = tuple(_read_curve(curve, mine[0].best) for curve in mine)
    points = [(seed, size.factor, rate) for size in sizes for seed, rate in enumerate(size.by_seed)]
    return GridFinding(along, ruled, sizes, fit_slope(points))


def _read_curve(curve: Curve, base_best: int) -> SizeFinding:
    means = {rung: curve.mean(rung) for rung in curve.losses}
    seeds = range(len(curve.losses[curve.best]))
    return SizeFinding(
        factor=curve.factor,
        best=_rate(curve.best),
        fitted=_rate(vertex(means)),
        by_seed=tuple(_rate(vertex({r: losses[seed] for r, losses in curve.losses.items()})) for seed in seeds),
        retuned=means[curve.best],
        carried=means[base_best],
        enclosed=min(means) < curve.best < max(means),
    )


def vertex(losses: dict[int, float]) -> float:
    """Rung, with fractions, of the least loss: of a parabola through the points within AROUND of the lowest.

    Never further than one rung from the lowest point, which it is where no parabola opens upwards.
    """
    best = min(losses, key=losses.__getitem__)
    near = [rung for rung in losses if abs(rung - best) <= AROUND and math.isfinite(losses[rung])]
    if len(near) < 3:
        return float(best)
    square, line, _ = np.polyfit([rung - best for rung in near], [losses[rung] for rung in near], 2)
    return best + min(1.0, max(-1.0, -line / (2 * square))) if square > 0 else float(best)


def fit_slope(points: Sequence[tuple[int, int, float]]) -> Slope:
    """Slope of log2 y over log2 x from (seed, x, y); seeds are paired, so each has its own level."""
    seeds = sorted({seed for seed, _, _ in points})
    x_N, y_N = (np.log2(np.array([point[axis] for point in points], dtype=float)) for axis in (1, 2))
    owner_N = np.array([seeds.index(seed) for seed, _, _ in points])
    x_N, y_N = _centred(x_N, owner_N), _centred(y_N, owner_N)
    spread = float(x_N @ x_N)
    slope = float(x_N @ y_N) / spread
    freedom = len(points) - len(seeds) - 1
    if freedom < 1:
        return Slope(slope, None)
    residual = float(np.sum((y_N - slope * x_N) ** 2)) / freedom
    half = float(student_t.ppf(0.5 + CONFIDENCE / 2, freedom)) * math.sqrt(residual / spread)
    return Slope(slope, (slope - half, slope + half))


def exponent(finding: GridFinding, assumed: float, *, sign: int) -> Slope:
    """The exponent that would leave no slope: the one the rules assumed, corrected by the slope that was left."""
    ends = finding.slope.interval
    interval = None if ends is None else tuple(sorted(assumed + sign * end for end in ends))
    return Slope(assumed + sign * finding.slope.value, interval)


def read_coordinates(rows: Sequence[Coordinate]) -> list[Flatness]:
    """Sizes after the last step, by direction, parametrisation and kind of module."""
    last = max(row.step for row in rows)
    groups: dict[tuple[Along, bool, str], list[Coordinate]] = {}
    for row in rows:
        if row.step == last:
            groups.setdefault((row.along, row.ruled, row.kind), []).append(row)
    found = []
    for (along, ruled, kind), members in groups.items():
        sizes: dict[int, list[float]] = {}
        for row in members:
            sizes.setdefault(row.factor, []).append(row.size)
        means = {factor: sum(values) / len(values) for factor, values in sizes.items()}
        slope = fit_slope([(row.seed, row.factor, row.size) for row in members])
        found.append(Flatness(along, ruled, kind, means, slope))
    return found


def _rate(rung: float) -> float:
    return 2 ** (rung * GRID_STEP)


def _centred(values_N: NDArray[np.float64], owner_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Less the mean of one's owner."""
    return values_N - (np.bincount(owner_N, values_N) / np.bincount(owner_N))[owner_N]
