"""The least additive loss under one or two budgets, exactly: a dynamic programme over groups that keeps what may win.

    solution = solve(loss_GC, cost_MGC, budget_M)           # solution.picks[g]: choice of group g; None: too little
    for solution in front(loss_GC, cost_GC): ...            # the best at every cost, the cheapest first

A multiple-choice knapsack. A partial solution is dropped when another one has no more loss and no more of any cost
(Nemhauser and Ullmann 1969). G groups, C choices, M costs (1 or 2, whole numbers), S partial solutions.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Solution:
    loss: float
    costs: tuple[int, ...]
    picks: tuple[int, ...]
    """The choice of each group."""


def solve(loss_GC: ArrayLike, cost_MGC: ArrayLike, budget_M: ArrayLike) -> Solution | None:
    """The solution of least loss within all budgets, the cheapest of equals; None when nothing is within them."""
    cost_MGC = np.asarray(cost_MGC, dtype=np.int64)
    found = _undominated(np.asarray(loss_GC, dtype=np.float64), cost_MGC, np.asarray(budget_M, dtype=np.int64))
    return min(found, key=lambda solution: (solution.loss, solution.costs), default=None)


def front(loss_GC: ArrayLike, cost_GC: ArrayLike) -> list[Solution]:
    """All solutions that no other beats in loss and cost, by rising cost and falling loss."""
    cost_1GC = np.asarray(cost_GC, dtype=np.int64)[None]
    unbounded_1 = cost_1GC.max(-1).sum(-1)
    found = _undominated(np.asarray(loss_GC, dtype=np.float64), cost_1GC, unbounded_1)
    return sorted(found, key=lambda solution: solution.costs)


def _undominated(
    loss_GC: NDArray[np.float64], cost_MGC: NDArray[np.int64], budget_M: NDArray[np.int64]
) -> list[Solution]:
    groups, choices = loss_GC.shape
    least_MG = cost_MGC.min(-1)
    loss_S, cost_MS = np.zeros(1), np.zeros((len(cost_MGC), 1), dtype=np.int64)
    picked: list[NDArray[np.int64]] = []
    came: list[NDArray[np.int64]] = []
    for group in range(groups):
        # Every partial solution with every choice; what the groups left must cost at least is set aside.
        grown_S = (loss_S[:, None] + loss_GC[group]).ravel()
        costs_MS = (cost_MS[:, :, None] + cost_MGC[:, group, None, :]).reshape(len(cost_MGC), -1)
        room_M = budget_M - least_MG[:, group + 1 :].sum(-1)
        fitting = np.flatnonzero((costs_MS <= room_M[:, None]).all(0))
        kept = fitting[_best(grown_S[fitting], costs_MS[:, fitting])]
        loss_S, cost_MS = grown_S[kept], costs_MS[:, kept]
        came.append(kept // choices)
        picked.append(kept % choices)
    return [
        Solution(float(loss_S[at]), tuple(cost_MS[:, at].tolist()), _trace(came, picked, at))
        for at in range(len(loss_S))
    ]


def _best(loss_S: NDArray[np.float64], cost_MS: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of those that no other one beats. By rising loss, the cheaper first: later ones never beat earlier.

    The costs kept so far form a staircase: first costs rise, second costs fall.
    """
    first_S, second_S = cost_MS[0], cost_MS[-1]
    steps: list[int] = []
    heights: list[int] = []
    kept: list[int] = []
    for at in np.lexsort((second_S, first_S, loss_S)).tolist():
        first, second = int(first_S[at]), int(second_S[at])
        place = bisect_right(steps, first)
        if place and heights[place - 1] <= second:
            continue
        kept.append(at)
        start = place - 1 if place and steps[place - 1] == first else place
        end = start
        while end < len(steps) and heights[end] >= second:
            end += 1
        steps[start:end], heights[start:end] = [first], [second]
    return np.array(sorted(kept), dtype=np.int64)


def _trace(came: list[NDArray[np.int64]], picked: list[NDArray[np.int64]], at: int) -> tuple[int, ...]:
    picks = []
    for parents_S, choices_S in zip(reversed(came), reversed(picked), strict=True):
        picks.append(int(choices_S[at]))
        at = int(parents_S[at])
    return tuple(reversed(picks))
