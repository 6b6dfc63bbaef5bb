"""From losses to claims: the best rate, its slope, and the exponents, against laws that are known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps.transfer.bench import Arm
from sweeps.transfer.fits import exponent, fit_slope, read_grid, vertex
from sweeps.transfer.grids import Curve
from sweeps.transfer.settings import GRID_STEP, Scale


@settings(max_examples=30)
@given(st.floats(-3.4, 3.4), st.floats(0.01, 5.0))
def test_the_vertex_of_a_parabola_is_found_between_the_rungs(middle, steepness):
    losses = {rung: 4 + steepness * (rung - middle) ** 2 for rung in range(-6, 7)}
    assert vertex(losses) == pytest.approx(middle, abs=1e-6)


def test_a_vertex_never_lies_far_from_what_was_measured():
    assert vertex({0: 3.0, 1: 3.1, 2: 3.2}) == pytest.approx(0.0, abs=1.0)
    assert vertex({0: 3.0, 1: 3.2, 2: 3.1}) == 0.0
    assert vertex({0: math.inf, 1: 3.0, 2: 3.2}) == 1.0


def test_the_slope_is_that_of_a_regression_with_a_level_for_every_seed():
    rng = np.random.default_rng(0)
    points = [
        (seed, 2**doubling, 2 ** (seed - 0.3 * doubling + 0.05 * rng.normal()))
        for seed in range(3)
        for doubling in range(4)
    ]
    design = np.array([[math.log2(size), *(seed == own for own in range(3))] for seed, size, _ in points], dtype=float)
    wanted, *_ = np.linalg.lstsq(design, np.log2([value for *_, value in points]), rcond=None)
    assert fit_slope(points).value == pytest.approx(wanted[0])


def test_the_interval_of_the_slope_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        points = [
            (seed, 2**doubling, 2 ** (0.2 * doubling + 0.1 * rng.normal()))
            for seed in range(3)
            for doubling in range(3)
        ]
        low, high = fit_slope(points).interval
        covered += low < 0.2 < high
    assert 0.92 < covered / 400 < 0.98


def curves(best_of: dict[int, float]) -> list[Curve]:
    """Parabolas with their lowest point at a rung for every factor, two seeds."""
    made = []
    for factor, best in best_of.items():
        arm = Arm(Scale(), Scale(steps=100 * factor), ruled=True)
        losses = {rung: [3 + 0.01 * (rung - best) ** 2 + seed for seed in range(2)] for rung in range(-20, 0)}
        made.append(Curve("tokens", factor, True, arm, losses))
    return made


def test_what_is_left_of_a_wrong_exponent_gives_the_right_one():
    # Under the rules the base's best rate should not move; rates truly fall as tokens^-0.3, the rules took 0.5.
    left = {factor: -10 + (0.5 - 0.3) * math.log2(factor) / GRID_STEP for factor in (1, 2, 4)}
    finding = read_grid(curves(left), along="tokens", ruled=True)
    assert finding.slope.value == pytest.approx(0.2)
    assert exponent(finding, 0.5, sign=-1).value == pytest.approx(0.3)


def test_moves_are_counted_in_grid_steps_and_carrying_over_costs_what_it_loses():
    finding = read_grid(curves({1: -10, 4: -12}), along="tokens", ruled=True)
    assert finding.moved == pytest.approx(2.0)
    assert finding.excess == pytest.approx((3.5 + 0.04) / 3.5 - 1)
    assert all(size.enclosed for size in finding.sizes)
