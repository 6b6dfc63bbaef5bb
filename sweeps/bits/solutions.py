"""What the dynamic programme makes of the sensitivities: for the budgets asked for, and along both fronts.

budgets = Budgets.of(problem, "4.5", None)
planned = best(problem, loss_GC, budgets);  rungs = ladder(problem, loss_GC, costs(problem)[0])      # allocations
"""

import difflib
from dataclasses import dataclass
from math import ceil, isfinite

import numpy as np
from numpy.typing import NDArray

from herd.run.errors import ConfigError
from sweeps.bits import knapsack
from sweeps.bits.problem import Problem

RUNGS = 8


@dataclass(frozen=True)
class Budgets:
    bits: float | None
    """Bits per weight of the groups, scales included; None: any number."""
    active_bits: float | None
    """The same over the weights one token reads."""

    @classmethod
    def of(cls, problem: Problem, bits: str | None, active_bits: str | None) -> "Budgets":
        """From the command line: numbers, or a choice's label for what it takes everywhere.

        ConfigError for neither, and for a budget below what the cheapest choices take, naming the least possible.
        """
        cheapest = {group.name: min(problem.labels, key=group.bytes.__getitem__) for group in problem.groups}
        found = []
        for flag, text, size in (
            ("--bits", bits, problem.bits_of),
            ("--active-bits", active_bits, problem.active_bits_of),
        ):
            value = size(problem.uniform(text)) if text in problem.labels else _number(flag, text, problem)
            least = size(cheapest)
            if value is not None and value < least:
                shown = ceil(least * 1e4) / 1e4
                raise ConfigError(
                    f"{flag} {text}: the least possible with these --choices is {shown:g}; give that or more"
                )
            found.append(value)
        return cls(*found)

    def bytes_in(self, problem: Problem) -> list[int]:
        """The two budgets in bytes, of all groups and of what a token reads."""
        whole = 8 * (problem.weights + problem.active_weights) * 16
        pairs = ((self.bits, problem.weights), (self.active_bits, problem.active_weights))
        return [whole if bits is None else int(bits * weights / 8 + 1e-6) for bits, weights in pairs]

    def dearest(self, problem: Problem) -> str:
        """The choice that takes most of those that are within the budgets everywhere, else the cheapest."""
        fitting = [label for label in problem.labels if self.hold(problem, problem.uniform(label))]
        size = {label: problem.bytes_of(problem.uniform(label)) for label in problem.labels}
        return max(fitting, key=size.__getitem__) if fitting else min(size, key=size.__getitem__)

    def hold(self, problem: Problem, allocation: dict[str, str]) -> bool:
        """Whether an allocation is within both."""
        total, active = self.bytes_in(problem)
        return problem.bytes_of(allocation) <= total and problem.active_of(allocation) <= active

    def describe(self) -> str:
        """For people."""
        parts = ((self.bits, "bits"), (self.active_bits, "active bits"))
        return ", ".join(f"{value:.5g} {name}" for value, name in parts if value is not None) or "no budget"


def _number(flag: str, text: str | None, problem: Problem) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        near = difflib.get_close_matches(text, problem.labels, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{flag} {text}: give a number of bits, or one of --choices; the nearest is {near}") from None
    if not isfinite(value):
        raise ConfigError(f"{flag} {text}: give a finite number of bits")
    return value


def best(problem: Problem, loss_GC: NDArray[np.float64], budgets: Budgets) -> dict[str, str]:
    """The allocation of least added loss within the budgets."""
    solution = knapsack.solve(loss_GC, costs(problem), budgets.bytes_in(problem))
    assert solution is not None, "Budgets.of checks"
    return _allocation(problem, solution)


def ladder(problem: Problem, loss_GC: NDArray[np.float64], cost_GC: NDArray[np.int64]) -> list[dict[str, str]]:
    """Allocations along the front of a size, evenly spread, by rising size."""
    along = knapsack.front(loss_GC, cost_GC)
    found = []
    for budget in np.geomspace(along[0].costs[0], along[-1].costs[0], RUNGS):
        within = [solution for solution in along if solution.costs[0] <= budget + 0.5]
        found.append(_allocation(problem, within[-1]))
    return list({tuple(allocation.items()): allocation for allocation in found}.values())


def costs(problem: Problem) -> NDArray[np.int64]:
    """Bytes [2, groups, choices]: stored, and read for a token."""
    whole = [[group.bytes[label] for label in problem.labels] for group in problem.groups]
    active = [[group.active(label) for label in problem.labels] for group in problem.groups]
    return np.array([whole, active], dtype=np.int64)


def _allocation(problem: Problem, solution: knapsack.Solution) -> dict[str, str]:
    return {group.name: problem.labels[pick] for group, pick in zip(problem.groups, solution.picks, strict=True)}
