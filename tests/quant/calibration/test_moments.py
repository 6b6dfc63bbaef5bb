"""Second moments and coverage: what hooks see is what the model's own experts are given; few tokens count little."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from quant.calibration.activations import Activations
from quant.calibration.coverage import batches_needed, count_routes, coverage_report, treatment
from quant.calibration.decoder import Decoder
from quant.calibration.moments import FEW, Input, Moments, measure
from quant.methods.targets import SHARE, corrected
from quant.plans import make_plan
from quant.schemes import Scheme
from quant.sources import open_source


def decoder_of(model: object) -> Decoder:
    source = open_source(model)
    return Decoder(make_plan(source, Scheme.named("int4", 32)), source)


def test_experts_hessians_are_of_the_routed_and_scaled_inputs_of_transformers(models, folders, tokens_BT):
    decoder = decoder_of(folders["scout"])
    given: list[torch.Tensor] = []

    class Watched(Llama4TextExperts):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            given.append(hidden.view(4, -1, 64).float())
            return super().forward(hidden)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders["scout"], dtype=torch.bfloat16)
    model.model.layers[0].feed_forward.experts.__class__ = Watched
    with torch.no_grad():
        model(input_ids=tokens_BT)
    names = [f"model.layers.0.feed_forward.experts.{e}.{leaf}" for e in range(4) for leaf in ("gate_proj", "up_proj")]
    with decoder.layer(0) as layer:
        moments = measure(decoder, 0, layer, [decoder.embed(tokens_BT)], names)
    assert sum(moments.tokens.values()) == tokens_BT.numel()  # every token meets one expert: routed-only cost
    for e in range(4):
        key = f"model.layers.0.feed_forward.experts.{e}.gate_proj"
        seen_TK = given[0][e]
        assert moments.tokens.get(key, 0) == int(seen_TK.any(1).sum())
        if key in moments.sums:
            assert torch.allclose(moments.sums[key], seen_TK.T @ seen_TK, rtol=1e-4, atol=1e-4)
    bank = moments.banks["model.layers.0.feed_forward.experts"]
    assert torch.allclose(bank, sum(moments.sums.values()), rtol=1e-4, atol=1e-4)


def filled(counts: list[int], columns: int = 8) -> Moments:
    moments = Moments()
    generator = torch.Generator().manual_seed(0)
    for e, count in enumerate(counts):
        for leaf in ("gate_proj", "down_proj"):
            if count:
                value_nK = torch.randn(count, columns, generator=generator)
                moments.add(f"l.experts.{e}.{leaf}", Input(value_nK, torch.arange(count)), None, summed=True)
    return moments


@given(count=st.integers(1, 60))
@settings(max_examples=20, deadline=None)
def test_a_starved_experts_hessian_is_drawn_towards_that_of_all_tokens(count: int):
    moments = filled([count, 500])
    for leaf in ("gate_proj", "down_proj"):
        key = f"l.experts.0.{leaf}"
        own = moments.sums[key] / count
        prior = (
            moments.banks["l.experts"] / (count + 500) if leaf == "gate_proj" else torch.eye(8) * own.diagonal().mean()
        )
        wanted = own if count >= FEW * 8 else (count * own + 8 * prior) / (count + 8)
        assert torch.allclose(moments.hessian(key, 8), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(moments.hessian("l.experts.1.gate_proj", 8), moments.sums["l.experts.1.gate_proj"] / 500)


def test_moments_do_not_depend_on_the_order_of_rows():
    value_nK = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    one, other = Moments(), Moments()
    one.add("a.mlp.gate_proj", Input(value_nK, None), None, summed=True)
    for part in order.split(30):
        other.add("a.mlp.gate_proj", Input(value_nK[part], None), None, summed=True)
    assert torch.allclose(one.hessian("a.mlp.gate_proj", 16), other.hessian("a.mlp.gate_proj", 16), atol=1e-5)


def test_a_shift_pairs_the_same_tokens_and_leaves_out_those_routed_elsewhere():
    generator = torch.Generator().manual_seed(3)
    here_nK, there_mK = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    moments = Moments()
    found, exact = Input(here_nK, torch.tensor([1, 4, 6])), Input(there_mK, torch.tensor([0, 4, 6]))
    moments.add("l.experts.0.gate_proj", found, exact, summed=True)
    wanted = (there_mK[1:] - here_nK[1:]).T @ here_nK[1:]
    assert torch.allclose(moments.shifts["l.experts.0.gate_proj"], wanted, atol=1e-6)


def test_corrected_weights_are_what_fits_the_unquantised_outputs_best():
    generator = torch.Generator().manual_seed(4)
    here_nK = torch.randn(400, 16, generator=generator)
    there_nK = here_nK + 0.3 * torch.randn(400, 16, generator=generator) + 0.2 * here_nK.roll(1, 1)
    weight_NK = torch.randn(5, 16, generator=generator)
    hessian_KK, shift_KK = here_nK.T @ here_nK / 400, (there_nK - here_nK).T @ here_nK / 400
    target_NK = corrected(weight_NK[None], hessian_KK[None], shift_KK[None])[0]
    best_NK = torch.linalg.lstsq(here_nK.double(), (there_nK @ weight_NK.T).double()).solution.T
    # All but the damping: a share of the way to the least-squares solution.
    wanted_NK = weight_NK + SHARE * (best_NK.float() - weight_NK)
    assert (target_NK - wanted_NK).norm() < 0.15 * (wanted_NK - weight_NK).norm()
    loss = lambda value_NK: (there_nK @ weight_NK.T - here_nK @ value_NK.T).square().sum()  # noqa: E731
    assert loss(target_NK) < loss(weight_NK)


@pytest.mark.parametrize("on_disk", [False, True])
def test_routes_are_counted_batch_by_batch_in_one_pass(folders, tokens_BT, tmp_path, on_disk: bool):
    decoder = decoder_of(folders["maverick"])
    batches = [tokens_BT[:1], tokens_BT[1:]]
    activations = Activations(tmp_path if on_disk else None, "routes", [(1, 40, 64), (1, 40, 64)])
    counts_BX = count_routes(decoder, batches, activations)
    assert counts_BX.shape == (2, 2 * 4)  # two of four layers have experts
    assert counts_BX.reshape(2, 2, 4).sum(2).tolist() == [[40, 40], [40, 40]]
    assert not list(tmp_path.iterdir())


@given(
    counts=st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=8),
    first=st.integers(1, 4),
    quota=st.integers(0, 80),
)
@settings(max_examples=100, deadline=None)
def test_rows_are_drawn_until_every_expert_has_its_quota_or_there_are_no_more(counts, first: int, quota: int):
    counts_BX = np.array(counts)
    first = min(first, len(counts))
    needed = batches_needed(counts_BX, first=first, quota=quota)
    assert first <= needed <= len(counts)
    enough = counts_BX[:needed].sum(0).min() >= quota
    assert enough or needed == len(counts)
    if needed > first and enough:
        assert counts_BX[: needed - 1].sum(0).min() < quota  # not one batch too many


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=20), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_the_coverage_report_accounts_for_every_expert(tokens: list[int], quota: int):
    facts = {
        "inputs": {
            f"model.layers.0.feed_forward.experts.{e}.{leaf}": {"tokens": n, "treatment": treatment(n, 64, expert=True)}
            for e, n in enumerate(tokens)
            for leaf in ("gate_proj", "down_proj")
        }
    }
    report = coverage_report([facts], rows=4, row_tokens=8, source="s", quota=quota)
    summary, experts = report["summary"], report["experts"]
    assert len(experts) == summary["experts"] == len(tokens)
    assert sorted(expert["tokens"] for expert in experts.values()) == sorted(tokens)
    assert summary["experts_below_quota"] == sum(n < quota for n in tokens)
    assert summary["least_tokens"] <= summary["median_tokens"] <= summary["most_tokens"]
    for expert in experts.values():
        assert (expert["treatment"] == "nearest") == (expert["tokens"] == 0)
        assert (expert["treatment"] == "measured") == (expert["tokens"] >= FEW * 64)
