"""Exponential means without the bias of their first steps: one of a curve, and one of several curves by entropy bin.

mean = RunningMean(20.0); mean.add(0.5); mean.value
means = BinnedMeans(("gap",), 20.0); means.add(stats.bins, lambda bin: (bin.gap,)); means.values("gap")
"""

from collections.abc import Callable, Sequence

from distill.weighting import entropy_bins
from distill.weighting.interface import Means

LEAN = 0.005
"""Share of all tokens by which the mean of all counts beside a bin's own."""


class RunningMean:
    """Of all values so far, the recent ones first; and the mean age, in steps, of what it averages."""

    def __init__(self, horizon: float) -> None:
        self._keep = 1.0 - 1.0 / horizon
        self._sum, self._weight, self._ages = 0.0, 0.0, 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        """One step's value, which counts `weight` times."""
        self._ages = self._keep * (self._ages + self._weight)
        self._sum = self._keep * self._sum + weight * value
        self._weight = self._keep * self._weight + weight

    def wait(self) -> None:
        """A step without a value: what there is grows older."""
        self._ages += self._weight

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else 0.0

    @property
    def weight(self) -> float:
        """What the mean rests on, in units of the weights added."""
        return self._weight

    @property
    def age(self) -> float:
        return self._ages / self._weight if self._weight else 0.0

    def state_dict(self) -> dict[str, float]:
        return {"sum": self._sum, "weight": self._weight, "ages": self._ages}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._sum, self._weight, self._ages = state["sum"], state["weight"], state["ages"]


class BinnedMeans:
    """Running means of some quantities in each bin of teacher entropy, each token counting once."""

    def __init__(self, names: Sequence[str], horizon: float) -> None:
        self._means = {name: [RunningMean(horizon) for _ in range(entropy_bins.COUNT)] for name in names}

    def add(self, bins: Sequence[Means], read: Callable[[Means], Sequence[float]]) -> None:
        """One step's bins; `read` gives a bin's quantities in the order of the names."""
        for index, of_bin in enumerate(bins):
            for means, value in zip(self._means.values(), read(of_bin), strict=True):
                means[index].add(value, of_bin.count)

    def values(self, name: str) -> list[float]:
        """Of every bin; a bin that holds hardly any token leans on the mean of all."""
        means = self._means[name]
        weights = [mean.weight for mean in means]
        total = sum(weights)
        if not total:
            return [0.0] * len(means)
        whole = sum(weight * mean.value for weight, mean in zip(weights, means, strict=True)) / total
        lean = LEAN * total
        return [(w * mean.value + lean * whole) / (w + lean) for w, mean in zip(weights, means, strict=True)]

    def state_dict(self) -> dict[str, list[dict[str, float]]]:
        return {name: [mean.state_dict() for mean in means] for name, means in self._means.items()}

    def load_state_dict(self, state: dict[str, list[dict[str, float]]]) -> None:
        for name, means in self._means.items():
            for mean, of_bin in zip(means, state[name], strict=True):
                mean.load_state_dict(of_bin)


def horizon_of(share: float, steps: int) -> float:
    """Steps that are this share of a run, 2 at least: with one, a mean would be the last value."""
    return max(2.0, share * steps)
