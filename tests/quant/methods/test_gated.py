"""Refinement by what errors do behind the activation: the objective by its definition, the slopes, what it gains."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from herd.run.errors import ConfigError
from quant.calibration.samples import Kept, Linear, activation_of, sample_of
from quant.formats.grid import Grid
from quant.methods.gated import GatedGptq
from quant.methods.gptq import Gptq
from quant.methods.objectives import PLAIN_SHARE, RIDGE, Gated, Plain
from quant.methods.refinement import descend, refit_scales
from tests.quant.tiny_models import build_llama

N, K = 12, 64
GRIDS = (Grid(4, True, 16), Grid(4, False, 32), Grid(8, True, None))


class Mlp:
    """gate and up of one expert, and inputs with few large directions."""

    def __init__(self, seed: int, tokens: int = 300, *, biased: bool = False):
        generator = torch.Generator().manual_seed(seed)
        mixing_KK = torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K)
        self.input_nK = torch.randn(tokens, K, generator=generator) @ mixing_KK
        self.weights = {leaf: 0.3 * torch.randn(N, K, generator=generator) for leaf in ("gate_proj", "up_proj")}
        self.bias = {leaf: torch.randn(N, generator=generator) if biased else None for leaf in self.weights}
        self.hessian_KK = self.input_nK.T @ self.input_nK / tokens

    def sample(self, leaf: str):
        parts = {one: Linear(self.weights[one], self.bias[one]) for one in self.weights}
        return sample_of(parts, leaf, self.input_nK, F.silu)

    def objective(self, leaf: str = "gate_proj") -> Gated:
        return Gated(self.input_nK, self.sample(leaf).slopes(slice(None)).square(), self.hessian_KK)

    def hidden(self, weights: dict[str, Tensor], input_nK: Tensor) -> Tensor:
        return F.silu(input_nK @ weights["gate_proj"].T) * (input_nK @ weights["up_proj"].T)


def hessians(mlp: Mlp, leaf: str = "gate_proj") -> Tensor:
    """Those of every row as the class describes them, float64 [N, K, K]."""
    weight_nN = mlp.sample(leaf).slopes(slice(None)).double().square()
    input_nK, tokens = mlp.input_nK.double(), len(mlp.input_nK)
    share = max(PLAIN_SHARE, K / (tokens + K))
    weighted_NKK = torch.einsum("nk,nl,nr->rkl", input_nK, input_nK, weight_nN / weight_nN.mean(0)) / tokens
    all_NKK = (1 - share) * weighted_NKK + share * mlp.hessian_KK.double()
    trace_N = all_NKK.diagonal(dim1=1, dim2=2).mean(1)
    return all_NKK + RIDGE * torch.diag_embed(trace_N[:, None].expand(N, K))


@pytest.mark.parametrize("tokens", [20, 300])
def test_every_rows_cost_curvature_pull_and_system_are_those_of_its_own_hessian(tokens: int):
    mlp = Mlp(0, tokens)
    objective, exact_NKK = mlp.objective(), hessians(mlp)
    generator = torch.Generator().manual_seed(1)
    error_NK = torch.randn(N, K, generator=generator)
    close = {"rtol": 1e-4, "atol": 1e-4}
    cost_N = torch.einsum("rk,rkl,rl->r", error_NK.double(), exact_NKK, error_NK.double())
    torch.testing.assert_close(objective.cost(error_NK[None])[0], cost_N.float(), **close)
    index_B, other_B = torch.tensor([5, 40, 2]), torch.tensor([7, 63])
    wanted_NBB = exact_NKK[:, index_B][:, :, index_B].float()
    torch.testing.assert_close(objective.curvature(index_B)[0], wanted_NBB, **close)
    pulls = objective.pulls(error_NK[None])
    change_NB = torch.randn(N, 2, generator=generator)
    pulls.move(other_B, change_NB[None])
    moved_NK = error_NK.index_add(1, other_B, change_NB)
    wanted_NK = torch.einsum("rk,rkl->rl", moved_NK.double(), exact_NKK).float()
    torch.testing.assert_close(pulls.read(index_B)[0], wanted_NK[:, index_B], **close)
    codes_NGS = torch.randint(-8, 8, (N, 4, K // 4), generator=generator).float()
    system_ENGG, wanted_ENG = objective.system(codes_NGS[None], error_NK[None], slice(None))
    part = slice(3, 7)
    some_ENGG, some_ENG = objective.system(codes_NGS[None, part], error_NK[None, part], part)
    torch.testing.assert_close(some_ENGG, system_ENGG[:, part])
    torch.testing.assert_close(some_ENG, wanted_ENG[:, part])
    basis_NGK = torch.einsum("ngs,gh->nghs", codes_NGS, torch.eye(4)).flatten(2).double()
    exact_NGG = torch.einsum("rgk,rkl,rhl->rgh", basis_NGK, exact_NKK, basis_NGK)
    torch.testing.assert_close(system_ENGG[0], exact_NGG.float(), rtol=1e-4, atol=1e-2)
    exact_NG = torch.einsum("rgk,rkl,rl->rg", basis_NGK, exact_NKK, error_NK.double())
    torch.testing.assert_close(wanted_ENG[0], exact_NG.float(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("grid", GRIDS)
def test_refining_rows_with_their_hessians_never_formed_is_refining_each_with_its_own(grid: Grid):
    mlp = Mlp(2)

    class InItsOrder(Plain):
        def order(self) -> Tensor:
            return mlp.objective().order()

    formed = InItsOrder(hessians(mlp).float())
    weight_NK = mlp.weights["gate_proj"]
    start = grid.search(weight_NK[:, None])  # every row a layer
    codes_N1K = grid.encode(weight_NK[:, None], start)
    apart = refit_scales(weight_NK[:, None], codes_N1K, start, formed, grid)
    wanted_N1K = descend(weight_NK[:, None], codes_N1K, apart, formed, grid)
    together = grid.search(weight_NK[None])
    found = refit_scales(weight_NK[None], codes_N1K[None, :, 0], together, mlp.objective(), grid)
    assert (found.scale_NG[0] == apart.scale_NG[:, 0]).float().mean() > 0.95  # fp32 sums may fall on the other bf16
    same_N = (found.scale_NG[0] == apart.scale_NG[:, 0]).all(1)
    codes_1NK = descend(weight_NK[None], codes_N1K[None, :, 0], found, mlp.objective(), grid)
    assert (codes_1NK[0] == wanted_N1K[:, 0])[same_N].float().mean() > 0.995
    assert (codes_1NK[0] != codes_N1K[:, 0]).any()


@pytest.mark.parametrize("leaf", ["gate_proj", "up_proj"])
def test_a_slope_is_what_a_small_error_is_multiplied_by(leaf: str):
    mlp = Mlp(3, biased=True)
    slope_nN = mlp.sample(leaf).slopes(slice(4, 9))
    outputs = {one: F.linear(mlp.input_nK, mlp.weights[one], mlp.bias[one])[:, 4:9].double() for one in mlp.weights}

    def hidden(step: float) -> Tensor:
        moved = outputs | {leaf: outputs[leaf] + step}
        return F.silu(moved["gate_proj"]) * moved["up_proj"]

    torch.testing.assert_close(slope_nN.double(), (hidden(1e-4) - hidden(-1e-4)) / 2e-4, rtol=1e-4, atol=1e-5)
    assert not slope_nN.requires_grad


@pytest.mark.parametrize("grid", GRIDS[:2])
def test_what_leaves_the_activation_is_closer_and_no_row_costs_more(grid: Grid):
    before, after = 0.0, 0.0
    for seed in range(4):
        mlp = Mlp(seed, tokens=2000)
        plain, gated = {}, {}
        for leaf, weight_NK in mlp.weights.items():
            hessian_EKK = mlp.hessian_KK[None]
            codes_ENK, parameters = Gptq().round(weight_NK[None], grid, hessian_EKK)
            plain[leaf] = grid.decode(codes_ENK, parameters)[0].float()
            method = GatedGptq()
            found = method.refine(weight_NK[None], codes_ENK, parameters, grid, hessian_EKK, [mlp.sample(leaf)])
            gated[leaf] = grid.decode(*found)[0].float()
            costs = [mlp.objective(leaf).cost((weight_NK - one[leaf])[None]) for one in (gated, plain)]
            assert torch.all(costs[0] <= costs[1] * (1 + 1e-4))
        fresh_nK = Mlp(seed, tokens=4000).input_nK[2000:]
        exact_nN = mlp.hidden(mlp.weights, fresh_nK)
        before += (mlp.hidden(plain, fresh_nK) - exact_nN).square().mean().item()
        after += (mlp.hidden(gated, fresh_nK) - exact_nN).square().mean().item()
    assert after < 0.985 * before


def test_rows_refined_in_parts_are_rows_refined_at_once(monkeypatch):
    mlp, grid = Mlp(4), GRIDS[1]
    weight_ENK, hessian_EKK = mlp.weights["up_proj"][None], mlp.hessian_KK[None]
    codes_ENK, parameters = Gptq().round(weight_ENK, grid, hessian_EKK)
    arguments = (weight_ENK, codes_ENK, parameters, grid, hessian_EKK)
    whole, _ = GatedGptq().refine(*arguments, [mlp.sample("up_proj")])
    monkeypatch.setattr("quant.methods.gated.CHUNK_BYTES", 5 * 4 * (32 * K + 8 * len(mlp.input_nK)))
    parts, _ = GatedGptq().refine(*arguments, [mlp.sample("up_proj")])
    assert (whole == parts).float().mean() > 0.99  # products of another size may round another way


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
