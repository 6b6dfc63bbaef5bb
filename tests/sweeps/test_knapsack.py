"""The dynamic programme against trying everything."""

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sweeps.bits.knapsack import front, solve


@st.composite
def instances(draw: st.DrawFn) -> tuple:
    groups, choices, costs = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    # Few different values, so that ties are common.
    loss_GC = draw(arrays(np.float64, (groups, choices), elements=st.integers(0, 12).map(lambda n: n / 4)))
    cost_MGC = draw(arrays(np.int64, (costs, groups, choices), elements=st.integers(0, 9)))
    budget_M = draw(arrays(np.int64, (costs,), elements=st.integers(0, 30)))
    return loss_GC, cost_MGC, budget_M


def everything(loss_GC: np.ndarray, cost_MGC: np.ndarray) -> list[tuple]:
    """(loss, costs) of every way to choose; quarters add up exactly."""
    groups, choices = loss_GC.shape
    return [
        (
            sum(loss_GC[g, c] for g, c in enumerate(picks)),
            tuple(sum(cost_GC[g, c] for g, c in enumerate(picks)) for cost_GC in cost_MGC),
        )
        for picks in product(range(choices), repeat=groups)
    ]


@given(instances())
def test_the_dynamic_programme_finds_what_trying_everything_finds(instance):
    loss_GC, cost_MGC, budget_M = instance
    allowed = [found for found in everything(loss_GC, cost_MGC) if all(np.array(found[1]) <= budget_M)]
    solution = solve(loss_GC, cost_MGC, budget_M)
    if not allowed:
        assert solution is None
        return
    assert (solution.loss, solution.costs) == min(allowed)
    groups = range(len(loss_GC))
    assert solution.loss == sum(loss_GC[g, solution.picks[g]] for g in groups)
    assert solution.costs == tuple(sum(cost_GC[g, solution.picks[g]] for g in groups) for cost_GC in cost_MGC)


@given(instances())
def test_the_front_is_everything_that_nothing_beats(instance):
    loss_GC, (cost_GC, *_), _ = instance
    found = {(loss, cost) for loss, (cost,) in everything(loss_GC, cost_GC[None])}
    unbeaten = {
        (loss, cost)
        for loss, cost in found
        if not any(a <= loss and b <= cost and (a, b) != (loss, cost) for a, b in found)
    }
    assert [(s.loss, s.costs[0]) for s in front(loss_GC, cost_GC)] == sorted(unbeaten, key=lambda pair: pair[1])
