"""HQQ and SignRound against their formulas in float64, and never worse than rounding to nearest on their own terms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.formats.grid import Grid, Parameters
from quant.methods.hqq import Hqq
from quant.methods.method import importance
from quant.methods.signround import SignRound
from tests.quant.methods.test_gptq import GRIDS, error, sample


@given(seed=st.integers(0, 10_000), which=st.integers(0, len(GRIDS) - 1), power=st.sampled_from([0.5, 0.7, 0.9]))
@settings(max_examples=25, deadline=None)
def test_no_group_has_a_larger_p_norm_with_hqq_than_rounded_to_nearest(seed: int, which: int, power: float):
    weight_ENK, _ = sample(seed, rows=8)
    grid, method = GRIDS[which], Hqq(power=power)
    nearest = grid.search(weight_ENK)
    codes_ENK, parameters = method.round(weight_ENK, grid, None)
    assert torch.equal(codes_ENK, grid.encode(weight_ENK, parameters))
    assert torch.all(method.objective(weight_ENK, grid, parameters) <= method.objective(weight_ENK, grid, nearest))


def test_hqq_lowers_the_p_norm_of_weights_with_outliers():
    weight_ENK, _ = sample(1, rows=64)
    weight_ENK[:, :, ::16] *= 6
    for grid in (Grid(4, True, 32), Grid(4, False, 32)):
        method = Hqq()
        before = method.objective(weight_ENK, grid, grid.search(weight_ENK)).sum()
        assert method.objective(weight_ENK, grid, method.round(weight_ENK, grid, None)[1]).sum() < 0.995 * before


def test_one_step_of_hqq_is_the_published_formula():
    weight_ENK, _ = sample(2, layers=1, rows=4)
    grid, method = Grid(4, False, 32), Hqq()
    start = grid.search(weight_ENK)
    _, found_ENG = method.step(weight_ENK, grid, start.scale_NG, start.zero_NG.float(), 10.0)
    weight = weight_ENK.double().view(4, 2, 32)
    scale, zero = start.scale_NG[0].double()[..., None], start.zero_NG[0].double()[..., None]
    codes = (weight / scale + zero).round().clamp(-8, 7)
    gap = weight / scale - (codes - zero)
    outlier = gap.sign() * (gap.abs() - gap.abs() ** (0.7 - 1) / 10.0).clamp(min=0)
    wanted = (codes - (weight / scale - outlier)).mean(-1).clamp(-8, 7)
    assert torch.allclose(found_ENG[0].double(), wanted, atol=1e-5)


@given(seed=st.integers(0, 10_000), which=st.integers(0, len(GRIDS) - 1))
@settings(max_examples=10, deadline=None)
def test_no_row_is_worse_with_signround_than_rounded_to_nearest(seed: int, which: int):
    weight_ENK, hessian_EKK = sample(seed, rows=8)
    grid = GRIDS[which]
    nearest = grid.search(weight_ENK, importance(hessian_EKK))
    before_EN = error(weight_ENK, grid.encode(weight_ENK, nearest), grid, nearest, hessian_EKK)
    codes_ENK, parameters = SignRound(steps=20).round(weight_ENK, grid, hessian_EKK)
    assert torch.all(error(weight_ENK, codes_ENK, grid, parameters, hessian_EKK) <= before_EN * (1 + 1e-4))


def test_signround_lowers_the_output_error_and_more_steps_more():
    weight_ENK, hessian_EKK = sample(3)
    grid = Grid(4, True, 32)
    nearest = grid.search(weight_ENK, importance(hessian_EKK))
    total = error(weight_ENK, grid.encode(weight_ENK, nearest), grid, nearest, hessian_EKK).sum()
    few, many = (
        error(
            weight_ENK, *SignRound(steps=steps).round(weight_ENK, grid, hessian_EKK)[:1], grid, parameters, hessian_EKK
        ).sum()
        for steps in (20, 200)
        for parameters in [SignRound(steps=steps).round(weight_ENK, grid, hessian_EKK)[1]]
    )
    assert few < 0.95 * total
    assert many < few


def test_signrounds_pull_is_half_the_gradient_that_autograd_finds():
    weight_ENK, hessian_EKK = sample(4, layers=1, rows=3)
    value_ENK = (weight_ENK + 0.01).double().requires_grad_()
    error_ENK = weight_ENK.double() - value_ENK
    torch.einsum("enk,ekl,enl->", error_ENK, hessian_EKK.double(), error_ENK).backward()
    pull_ENK = error_ENK.detach() @ hessian_EKK.double()
    assert torch.allclose(value_ENK.grad, -2 * pull_ENK)


@pytest.mark.parametrize("method", [Hqq(), SignRound(steps=5)])
def test_zeros_stay_zeros(method: Hqq | SignRound):
    codes_ENK, parameters = method.round(torch.zeros(1, 4, 64), Grid(4, True, 32), torch.eye(64)[None])
    assert torch.equal(codes_ENK, torch.zeros(1, 4, 64, dtype=torch.int8))
    assert parameters.scale_NG.isfinite().all()
    assert isinstance(parameters, Parameters)
