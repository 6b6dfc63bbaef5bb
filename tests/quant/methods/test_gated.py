"""Refinement by what errors do to a feed-forward part's output: the objectives by definition, and what it gains."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from herd.run.errors import ConfigError
from quant.calibration.samples import Kept, activation_of
from quant.formats.grid import Grid
from quant.methods.feed_forward import FeedForwards
from quant.methods.gated import GatedGptq
from quant.methods.gptq import Gptq
from quant.methods.method import FeedForward, Rounded
from quant.methods.objectives import PLAIN_SHARE, RIDGE, Gated, Inputs
from quant.methods.refinement import refine
from tests.quant.tiny_models import build_llama

N, K, H = 12, 64, 4
GRIDS = (Grid(4, True, 16), Grid(4, False, 32), Grid(8, True, None))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Mlp:
    """gate, up and down of one expert, and inputs with few large directions."""

    def __init__(self, seed: int, tokens: int = 300, *, rows: int = N, biased: bool = False):
        generator = torch.Generator().manual_seed(seed)
        mixing_KK = torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K)
        self.input_nK = torch.randn(tokens, K, generator=generator) @ mixing_KK
        self.weights = [0.3 * torch.randn(rows, K, generator=generator) for _ in range(2)]
        self.down_HN = torch.randn(H, rows, generator=generator)
        self.biases = tuple(torch.randn(rows, generator=generator) if biased else None for _ in range(2))
        self.hessian_KK = self.input_nK.T @ self.input_nK / tokens

    def part(self, activation=F.silu) -> FeedForward:
        return FeedForward(self.input_nK, self.down_HN, self.biases, activation)

    def output(self, weights: Sequence[Tensor], input_nK: Tensor | None = None, activation=F.silu) -> Tensor:
        input_nK = self.input_nK if input_nK is None else input_nK
        gate_nN, up_nN = (F.linear(input_nK, *one) for one in zip(weights, self.biases, strict=True))
        return activation(gate_nN) * up_nN @ self.down_HN.T


def objective_of(tokens: Sequence[int]) -> tuple[Gated, Tensor, Tensor]:
    """One of layers that met so many tokens, and its Hessians [E, N, K, K] and leans [E, N, K] in float64."""
    generator = torch.Generator().manual_seed(sum(tokens))
    parts = [Mlp(seed, count) for seed, count in enumerate(tokens)]
    weights = [torch.rand(count, N, generator=generator).square() for count in tokens]
    crosses = [torch.randn(count, N, generator=generator) for count in tokens]
    hessian_EKK = torch.stack([part.hessian_KK for part in parts])
    inputs = Inputs(padded([part.input_nK for part in parts]), torch.tensor([float(count) for count in tokens]))
    hessians, leans = [], []
    for part, weight_nN, cross_nN, count in zip(parts, weights, crosses, tokens, strict=True):
        input_nK, mean_N = part.input_nK.double(), weight_nN.double().mean(0)
        share = max(PLAIN_SHARE, K / (count + K))
        weighted_NKK = torch.einsum("nk,nl,nr->rkl", input_nK, input_nK, weight_nN / mean_N) / count
        all_NKK = (1 - share) * weighted_NKK + share * part.hessian_KK.double()
        trace_N = all_NKK.diagonal(dim1=1, dim2=2).mean(1)
        hessians.append(all_NKK + RIDGE * torch.diag_embed(trace_N[:, None].expand(N, K)))
        leans.append((1 - share) / count * (cross_nN / mean_N).T @ input_nK)
    return Gated(inputs, padded(weights), padded(crosses), hessian_EKK), torch.stack(hessians), torch.stack(leans)


def padded(tensors: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True)


@pytest.mark.parametrize("tokens", [(20,), (300,), (300, 50)])
def test_every_rows_cost_curvature_pull_and_system_are_those_of_its_own_hessian(tokens: tuple[int, ...]):
    objective, exact_ENKK, lean_ENK = objective_of(tokens)
    generator = torch.Generator().manual_seed(1)
    layers = len(tokens)
    error_ENK = torch.randn(layers, N, K, generator=generator)
    cost_EN = torch.einsum("erk,erkl,erl->er", error_ENK.double(), exact_ENKK, error_ENK.double())
    cost_EN += 2 * (lean_ENK * error_ENK).sum(-1)
    torch.testing.assert_close(objective.cost(error_ENK), cost_EN.float(), **CLOSE)
    index_B, other_B = torch.tensor([5, 40, 2]), torch.tensor([7, 63])
    wanted_ENBB = exact_ENKK[:, :, index_B][..., index_B].float()
    torch.testing.assert_close(objective.curvature(index_B), wanted_ENBB, **CLOSE)
    pulls = objective.pulls(error_ENK)
    change_ENB = torch.randn(layers, N, 2, generator=generator)
    pulls.move(other_B, change_ENB)
    moved_ENK = error_ENK.index_add(2, other_B, change_ENB)
    wanted_ENK = torch.einsum("erk,erkl->erl", moved_ENK.double(), exact_ENKK) + lean_ENK
    torch.testing.assert_close(pulls.read(index_B), wanted_ENK.float()[..., index_B], **CLOSE)
    codes_ENGS = torch.randint(-8, 8, (layers, N, 4, K // 4), generator=generator).float()
    system_ENGG, wanted_ENG = objective.system(codes_ENGS, error_ENK, slice(None))
    part = slice(3, 7)
    some_ENGG, some_ENG = objective.system(codes_ENGS[:, part], error_ENK[:, part], part)
    torch.testing.assert_close(some_ENGG, system_ENGG[:, part])
    torch.testing.assert_close(some_ENG, wanted_ENG[:, part])
    basis_ENGK = torch.einsum("engs,gh->enghs", codes_ENGS, torch.eye(4)).flatten(3).double()
    exact_ENGG = torch.einsum("ergk,erkl,erhl->ergh", basis_ENGK, exact_ENKK, basis_ENGK)
    torch.testing.assert_close(system_ENGG, exact_ENGG.float(), rtol=1e-4, atol=1e-2)
    exact_ENG = torch.einsum("ergk,erkl,erl->erg", basis_ENGK, exact_ENKK, error_ENK.double())
    exact_ENG += (basis_ENGK @ lean_ENK[..., None])[..., 0]
    torch.testing.assert_close(wanted_ENG, exact_ENG.float(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("grid", GRIDS)
def test_no_row_costs_more_after_refinement_and_most_cost_less(grid: Grid):
    objective, _, _ = objective_of((300, 50))
    weight_ENK = torch.stack([Mlp(seed).weights[0] for seed in (0, 1)])
    start = grid.search(weight_ENK)
    codes_ENK = grid.encode(weight_ENK, start)
    before_EN = objective.cost(weight_ENK - grid.decode(codes_ENK, start).float())
    refined = refine(weight_ENK, codes_ENK, start, objective, grid, rounds=1)
    change_EN = objective.cost(weight_ENK - grid.decode(*refined).float()) - before_EN
    assert change_EN.max() <= 1e-4 * before_EN.abs().max()
    assert (change_EN < 0).float().mean() > 0.9


def test_what_outputs_miss_is_known_after_any_change_and_never_grows():
    mlps = [Mlp(0, 300, biased=True), Mlp(1, 40, biased=True)]
    generator = torch.Generator().manual_seed(0)
    wanted = [torch.stack([mlp.weights[which] for mlp in mlps]) for which in (0, 1)]
    now = [one + 0.1 * torch.randn(one.shape, generator=generator) for one in wanted]
    several = FeedForwards([mlp.part() for mlp in mlps], wanted, now)
    taken = []
    for step in range(40):
        which, rows = step % 2, slice(step % 9, step % 9 + 1 + step % 4)
        value_ERK = now[which][:, rows] + 0.05 * torch.randn(now[which][:, rows].shape, generator=generator)
        before_E = several.cost()
        better_E = several.put(which, rows, value_ERK)
        now[which][better_E, rows] = value_ERK[better_E]
        misses = [
            (mlp.output([one[at] for one in wanted]) - mlp.output([one[at] for one in now])).square().sum()
            for at, mlp in enumerate(mlps)
        ]
        torch.testing.assert_close(several.cost(), torch.stack(misses), rtol=1e-3, atol=1e-3)
        assert (several.cost() <= before_E * (1 + 1e-4)).all()
        taken += better_E.tolist()
    assert 0.1 < sum(taken) / len(taken) < 0.9


@pytest.mark.parametrize("rows", [slice(3, 4), slice(4, 8)])
@pytest.mark.parametrize("which", [0, 1])
def test_an_objective_bounds_what_moved_rows_do_to_the_outputs_and_is_exact_for_one_row(which: int, rows: slice):
    mlp = Mlp(2, 400, biased=True)
    generator = torch.Generator().manual_seed(0)
    wanted = [one[None] for one in mlp.weights]
    now = [one + 0.1 * torch.randn(one.shape, generator=generator) for one in wanted]
    linear = [lambda gate: gate, F.silu][which]  # then the part is linear in the weights that move
    several = FeedForwards([mlp.part(linear)], wanted, now)
    objective = several.objective(which, rows, torch.zeros(1, K, K))
    other_nN = F.linear(mlp.input_nK, now[1 - which][0], mlp.biases[1 - which])
    slope_nN = other_nN if which == 0 else F.silu(other_nN)
    metric_RR = (mlp.down_HN.T @ mlp.down_HN)[rows, rows]
    size_R = metric_RR.diagonal().sqrt()
    own_R = torch.linalg.eigvalsh(metric_RR / size_R / size_R[:, None])[-1].clamp(min=1) * size_R.square()
    unit_R = (own_R * slope_nN[:, rows].square()).mean(0) * 400 / (1 - PLAIN_SHARE)  # of what rows are scaled to
    before = several.cost()
    error_1RK = wanted[which][:, rows] - now[which][:, rows]
    for _ in range(10):
        moved = [one.clone() for one in now]
        moved[which][:, rows] += 0.05 * torch.randn(error_1RK.shape, generator=generator)
        after = FeedForwards([mlp.part(linear)], wanted, moved).cost()
        moved_1RK = wanted[which][:, rows] - moved[which][:, rows]
        foreseen = [objective.cost(one) - ridge(objective, one) for one in (moved_1RK, error_1RK)]
        change = ((foreseen[0] - foreseen[1])[0] * unit_R).sum()
        if rows.stop - rows.start == 1:
            torch.testing.assert_close(change, (after - before)[0], rtol=1e-2, atol=1e-2)
        else:
            assert change > (after - before)[0]


def ridge(objective: Gated, error_ENK: Tensor) -> Tensor:
    return objective._ridge_EN * error_ENK.square().sum(-1)


@pytest.mark.parametrize("grid", GRIDS[:2])
def test_outputs_of_tokens_never_seen_are_closer_though_nothing_is_correlated(grid: Grid):
    before, after = 0.0, 0.0
    for seed in range(4):
        mlp = Mlp(seed, tokens=2000, rows=40)
        plain = [rounded(weight_NK, grid, mlp.hessian_KK) for weight_NK in mlp.weights]
        refined = GatedGptq().refine(*plain, grid, [mlp.part()])
        outputs = [mlp.output([values(one, grid)[0] for one in pair]) for pair in (plain, refined)]
        seen = [(one - mlp.output(mlp.weights)).square().mean().item() for one in outputs]
        assert seen[1] < seen[0]
        fresh_nK = Mlp(seed, tokens=4000, rows=40).input_nK[2000:]
        exact_nH = mlp.output(mlp.weights, fresh_nK)
        found = [mlp.output([values(one, grid)[0] for one in pair], fresh_nK) for pair in (plain, refined)]
        before += (found[0] - exact_nH).square().mean().item()
        after += (found[1] - exact_nH).square().mean().item()
    assert after < 0.95 * before


def rounded(weight_NK: Tensor, grid: Grid, hessian_KK: Tensor) -> Rounded:
    return Rounded(weight_NK[None], hessian_KK[None], *Gptq().round(weight_NK[None], grid, hessian_KK[None]))


def values(one: Rounded, grid: Grid) -> Tensor:
    return grid.decode(one.codes_ENK, one.parameters).float()


def test_experts_refined_side_by_side_are_experts_refined_one_by_one(monkeypatch):
    mlps, grid = [Mlp(0, 50), Mlp(1, 300), Mlp(2, 120)], GRIDS[1]
    hessian_EKK = torch.stack([mlp.hessian_KK for mlp in mlps])
    weights = [torch.stack([mlp.weights[which] for mlp in mlps]) for which in (0, 1)]
    pair = [Rounded(one, hessian_EKK, *Gptq().round(one, grid, hessian_EKK)) for one in weights]
    monkeypatch.setattr("quant.methods.feed_forward.MOST_ROWS", 1)  # else experts have to agree on a chunk
    monkeypatch.setattr("quant.methods.objectives.Gated.order", lambda self: torch.arange(K))  # and on an order
    together = GatedGptq().refine(*pair, grid, [mlp.part() for mlp in mlps])
    monkeypatch.setattr("quant.methods.gated.BATCH_BYTES", 1)
    apart = GatedGptq().refine(*pair, grid, [mlp.part() for mlp in mlps])
    for one, other, start in zip(together, apart, pair, strict=True):
        assert (one.codes_ENK == other.codes_ENK).float().mean() > 0.99  # products of another size round another way
        assert (one.codes_ENK != start.codes_ENK).float().mean() > 0.02


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 40))
def test_kept_inputs_are_evenly_spaced_whatever_the_batches(sizes: list[int], most: int):
    stream_nK = torch.arange(sum(sizes)).float()[:, None]
    kept = Kept(most)
    for part in stream_nK.split(sizes):
        kept.add(part)
    found = kept.inputs()[:, 0]
    assert len(found) <= most
    assert len(found) >= min(len(stream_nK), (most + 1) // 2)
    steps = found.diff().unique()
    assert len(steps) <= 1
    assert len(found) == 0 or found[0] == 0


def test_a_model_that_does_not_name_its_activation_is_refused():
    config = build_llama().config
    config.hidden_act = "of-its-own"
    with pytest.raises(ConfigError, match=r"hidden_act = 'of-its-own' of a llama: gptq-gated must know .* use gptq$"):
        activation_of(config)
