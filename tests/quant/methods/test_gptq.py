"""GPTQ against a plain float64 reading of its rule, brute force, and what must hold for any Hessian."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.formats.grid import Grid, Parameters
from quant.methods.gptq import Gptq, damped, inverse_factor
from quant.methods.method import importance, output_error
from quant.methods.objectives import Plain
from quant.methods.refinement import descend, refit_scales

GRIDS = (Grid(4, True, 32), Grid(4, False, 32), Grid(4, True, None), Grid(8, True, 64))


def sample(
    seed: int, *, layers: int = 2, rows: int = 24, columns: int = 64, tokens: int = 200
) -> tuple[Tensor, Tensor]:
    """Weights [E, N, K] and Hessians of correlated inputs [E, K, K]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(layers, columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    input_EnK = torch.randn(layers, tokens, columns, generator=generator) @ mixing
    weight_ENK = 0.05 * torch.randn(layers, rows, columns, generator=generator)
    return weight_ENK, input_EnK.mT @ input_EnK / tokens


def error(weight_ENK: Tensor, codes_ENK: Tensor, grid: Grid, parameters: Parameters, hessian_EKK: Tensor) -> Tensor:
    """Mean squared output error of every row, float64."""
    error_ENK = weight_ENK.double() - grid.decode(codes_ENK, parameters).double()
    return torch.einsum("enk,ekl,enl->en", error_ENK, hessian_EKK.double(), error_ENK)


def one_by_one(weight_NK: Tensor, grid: Grid, parameters: Parameters, hessian_KK: Tensor, order: list[int]) -> Tensor:
    """The rule as stated, float64: round a column, then set those left to where the output error is least."""
    errors_NK = torch.zeros_like(weight_NK, dtype=torch.float64)
    codes_NK = torch.zeros(weight_NK.shape, dtype=torch.int8)
    hessian_KK = hessian_KK.double()
    for step, k in enumerate(order):
        fixed, left = order[:step], order[step:]
        wanted_N = weight_NK[:, k].double()
        if fixed:
            coupling = hessian_KK[fixed][:, left]
            best_NL = -torch.linalg.solve(hessian_KK[left][:, left], (errors_NK[:, fixed] @ coupling).T).T
            wanted_N = wanted_N - best_NL[:, 0]
        group = k // (weight_NK.shape[1] // parameters.scale_NG.shape[-1])
        zero_NG = None if parameters.zero_NG is None else parameters.zero_NG[:, group : group + 1]
        one = Parameters(parameters.scale_NG[:, group : group + 1], zero_NG)
        codes_NK[:, k] = grid.encode(wanted_N[:, None], one)[:, 0]
        errors_NK[:, k] = weight_NK[:, k].double() - grid.decode(codes_NK[:, k : k + 1], one)[:, 0].double()
    return codes_NK


@pytest.mark.parametrize("grid", GRIDS)
def test_the_sweep_is_the_rule_column_by_column(grid: Grid):
    weight_ENK, hessian_EKK = sample(0)
    parameters = grid.search(weight_ENK)
    codes_ENK = Gptq().sweep(weight_ENK, grid, parameters, hessian_EKK)
    better = 0
    for e in range(len(weight_ENK)):
        zero_NG = None if parameters.zero_NG is None else parameters.zero_NG[e]
        one = Parameters(parameters.scale_NG[e], zero_NG)
        order = hessian_EKK[e].diagonal().argsort(descending=True).tolist()
        wanted_NK = one_by_one(weight_ENK[e], grid, one, hessian_EKK[e], order)
        improved_N = (codes_ENK[e] != grid.encode(weight_ENK[e], one)).any(1)
        better += int(improved_N.sum())
        assert (codes_ENK[e] == wanted_NK)[improved_N].float().mean() > 0.995  # fp32 may tip a tie, and what follows it
    assert better > 0.9 * weight_ENK.shape[0] * weight_ENK.shape[1]


@pytest.mark.parametrize("grid", GRIDS)
def test_with_uncorrelated_inputs_it_is_rounding_to_nearest(grid: Grid):
    weight_ENK, _ = sample(1)
    hessian_EKK = 3.0 * torch.eye(64).expand(2, 64, 64)
    codes_ENK, parameters = Gptq(rounds=0).round(weight_ENK, grid, hessian_EKK)
    nearest = grid.search(weight_ENK)
    assert torch.equal(codes_ENK, grid.encode(weight_ENK, nearest))
    assert torch.equal(parameters.scale_NG, nearest.scale_NG)


def test_with_endless_damping_it_is_rounding_to_nearest():
    weight_ENK, hessian_EKK = sample(2)
    grid = GRIDS[0]
    parameters = grid.search(weight_ENK, importance(hessian_EKK))
    codes_ENK = Gptq().sweep(weight_ENK, grid, parameters, damped(hessian_EKK, 1e9))
    assert torch.equal(codes_ENK, grid.encode(weight_ENK, parameters))


@given(seed=st.integers(0, 10_000), which=st.integers(0, len(GRIDS) - 1), tokens=st.integers(1, 300))
@settings(max_examples=25, deadline=None)
def test_no_row_is_worse_than_rounded_to_nearest_at_the_same_scales(seed: int, which: int, tokens: int):
    weight_ENK, hessian_EKK = sample(seed, rows=8, tokens=tokens)
    grid, method = GRIDS[which], Gptq()
    codes_ENK, parameters = method.round(weight_ENK, grid, hessian_EKK)
    own_EKK = damped(hessian_EKK, method.damping)  # the method's objective, which its scales are searched for too
    nearest = grid.search(weight_ENK, importance(own_EKK))
    before_EN = error(weight_ENK, grid.encode(weight_ENK, nearest), grid, nearest, own_EKK)
    after_EN = error(weight_ENK, codes_ENK, grid, parameters, own_EKK)
    assert after_EN.isfinite().all() and torch.all(after_EN <= before_EN * (1 + 1e-4))


def test_output_error_falls_by_a_third_and_refinement_takes_off_more():
    weight_ENK, hessian_EKK = sample(3, rows=64)
    grid = GRIDS[0]
    nearest = grid.search(weight_ENK)
    total = error(weight_ENK, grid.encode(weight_ENK, nearest), grid, nearest, hessian_EKK).sum()
    plain, refined = (
        error(weight_ENK, codes, grid, parameters, hessian_EKK).sum()
        for codes, parameters in (Gptq(rounds=rounds).round(weight_ENK, grid, hessian_EKK) for rounds in (0, 3))
    )
    assert plain < 0.67 * total
    assert refined < 0.95 * plain


def test_refinement_never_raises_the_error_of_a_row():
    weight_ENK, hessian_EKK = sample(4)
    for grid in GRIDS:
        parameters = grid.search(weight_ENK)
        codes_ENK = grid.encode(weight_ENK, parameters)
        before_EN = error(weight_ENK, codes_ENK, grid, parameters, hessian_EKK)
        parameters = refit_scales(weight_ENK, codes_ENK, parameters, Plain(hessian_EKK), grid)
        between_EN = error(weight_ENK, codes_ENK, grid, parameters, hessian_EKK)
        codes_ENK = descend(weight_ENK, codes_ENK, parameters, Plain(hessian_EKK), grid)
        after_EN = error(weight_ENK, codes_ENK, grid, parameters, hessian_EKK)
        assert torch.all(between_EN <= before_EN * (1 + 1e-5))
        assert torch.all(after_EN <= between_EN * (1 + 1e-5))
        assert after_EN.sum() < before_EN.sum()


def test_fitted_scales_are_the_least_squares_solution():
    weight_ENK, hessian_EKK = sample(5, layers=1, rows=6)
    grid = Grid(8, True, 32)
    parameters = grid.search(weight_ENK)
    codes_ENK = grid.encode(weight_ENK * 1.01, parameters)  # scales one percent off
    found = refit_scales(weight_ENK, codes_ENK, parameters, Plain(hessian_EKK), grid).scale_NG[0].double()
    root_KK = torch.linalg.cholesky(hessian_EKK[0].double())
    for n in range(6):
        design = torch.stack(
            [root_KK[:32].T @ codes_ENK[0, n, :32].double(), root_KK[32:].T @ codes_ENK[0, n, 32:].double()], 1
        )
        wanted = torch.linalg.lstsq(design, root_KK.T @ weight_ENK[0, n].double()).solution
        assert torch.allclose(found[n], wanted, rtol=2.0**-7)  # stored in bf16


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_small_rows_come_close_to_the_best_of_all_codes(columns: int):
    weight_ENK, hessian_EKK = sample(6, layers=1, rows=40, columns=columns, tokens=20)
    grid = Grid(4, True, None)
    parameters = grid.search(weight_ENK)
    every_MK = torch.tensor(list(itertools.product(range(-8, 8), repeat=columns)), dtype=torch.int8)
    least_N = torch.stack([
        error(
            weight_ENK[:, n : n + 1].expand(1, len(every_MK), columns), every_MK[None], grid,
            Parameters(parameters.scale_NG[:, n : n + 1].expand(1, len(every_MK), 1)), hessian_EKK,
        ).min()
        for n in range(40)
    ])  # fmt: skip
    codes_ENK = Gptq().sweep(weight_ENK, grid, parameters, hessian_EKK)
    codes_ENK = descend(weight_ENK, codes_ENK, parameters, Plain(hessian_EKK), grid)
    found_N = error(weight_ENK, codes_ENK, grid, parameters, hessian_EKK)[0]
    assert torch.all(found_N >= least_N * (1 - 1e-6))
    assert found_N.sum() <= (1 + 1e-6 if columns == 1 else 1.1) * least_N.sum()


def test_the_order_of_columns_is_undone():
    weight_ENK, hessian_EKK = sample(7, layers=1)
    grid = Grid(4, True, None)
    order_K = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    codes_ENK, parameters = Gptq(rounds=0).round(weight_ENK, grid, hessian_EKK)
    moved_ENK, same = Gptq(rounds=0).round(weight_ENK[:, :, order_K], grid, hessian_EKK[:, order_K][:, :, order_K])
    assert torch.equal(parameters.scale_NG, same.scale_NG)
    assert (moved_ENK == codes_ENK[:, :, order_K]).float().mean() > 0.99


def test_experts_together_are_experts_one_by_one():
    weight_ENK, hessian_EKK = sample(8, layers=3)
    grid = GRIDS[0]
    codes_ENK, parameters = Gptq().round(weight_ENK, grid, hessian_EKK)
    for e in range(3):
        codes_1NK, one = Gptq().round(weight_ENK[e : e + 1], grid, hessian_EKK[e : e + 1])
        together = error(
            weight_ENK[e : e + 1],
            codes_ENK[e : e + 1],
            grid,
            Parameters(parameters.scale_NG[e : e + 1]),
            hessian_EKK[e : e + 1],
        )
        alone = error(weight_ENK[e : e + 1], codes_1NK, grid, one, hessian_EKK[e : e + 1])
        assert torch.allclose(together.sum(), alone.sum(), rtol=0.01)


def test_the_inverse_factor_is_exact_and_survives_what_fp32_cannot_factor():
    _, hessian_EKK = sample(9)
    factor_EKK = inverse_factor(damped(hessian_EKK, 0.01)).double()
    exact_EKK = torch.linalg.inv(damped(hessian_EKK, 0.01).double())
    assert torch.allclose(factor_EKK.mT @ factor_EKK, exact_EKK, rtol=1e-3, atol=1e-3 * exact_EKK.abs().max())
    scale_K = torch.logspace(0, -6, 64)
    hard_KK = hessian_EKK[0] * scale_K[:, None] * scale_K[None, :]
    broken_KK = -torch.eye(64)
    factors = inverse_factor(torch.stack([hard_KK, broken_KK, hessian_EKK[0] + torch.eye(64)]))
    assert factors.isfinite().all()
    assert torch.equal(factors[1], torch.eye(64))


def test_channels_without_input_and_rows_of_zeros_do_no_harm():
    weight_ENK, hessian_EKK = sample(10)
    hessian_EKK[:, 5] = hessian_EKK[:, :, 5] = 0
    weight_ENK[:, 3] = 0
    for hessian in (hessian_EKK, torch.zeros_like(hessian_EKK)):
        codes_ENK, parameters = Gptq().round(weight_ENK, GRIDS[0], hessian)
        value_ENK = GRIDS[0].decode(codes_ENK, parameters)
        assert value_ENK.isfinite().all()
        assert torch.equal(value_ENK[:, 3], torch.zeros_like(value_ENK[:, 3]))


def test_output_error_is_the_mean_squared_error_of_the_output():
    weight_ENK, _ = sample(11, layers=1)
    input_nK = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    hessian_EKK = (input_nK.T @ input_nK / 50)[None]
    assert torch.allclose(
        output_error(weight_ENK, hessian_EKK)[0], (input_nK @ weight_ENK[0].T).square().mean(0), rtol=1e-4
    )
