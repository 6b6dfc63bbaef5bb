"""Router logits are found in any model; the balance loss and load figures equal independent counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from herd.llama4.balance import ExpertLoad, RouterTap, balance_loss
from herd.llama4.experts import use_sparse_experts
from herd.llama4.model import build

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}


def make_llama4():
    return build("maverick-nano", overrides={"vocab_size": 512}, seed=0)


def make_mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4))


@pytest.mark.parametrize("make", [make_llama4, lambda: use_sparse_experts(make_llama4()), make_mixtral])
def test_the_tap_sees_what_transformers_records_attached_to_the_graph(make):
    model = make()
    tap = RouterTap(model)
    tokens = torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(0))
    recorded = model(tokens, output_router_logits=True).router_logits
    taken = tap.take()
    assert len(taken) == tap.layers == len(recorded) == 2
    for one, two in zip(taken, recorded, strict=True):
        assert torch.equal(one, two) and one.shape[0] == 40
    balance_loss(taken, 1).backward()
    routers = [p for name, p in model.named_parameters() if name.endswith(("router.weight", "gate.weight"))]
    assert len(routers) == 2 and all(router.grad.abs().max() > 0 for router in routers)
    assert tap.take() == []
    tap.close()
    model(tokens)
    assert tap.take() == []


def test_a_model_without_experts_gives_no_layers_and_no_loss():
    tap = RouterTap(LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2)))
    assert tap.layers == 0
    assert balance_loss(tap.take(), 1).item() == 0
    assert ExpertLoad(1).take() is None


@given(tokens=st.integers(1, 40), experts=st.integers(2, 9), seed=st.integers(0, 999), data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_loss_is_the_definition_in_float64_and_transformers_over_k(tokens, experts, seed, data):
    top_k = data.draw(st.integers(1, experts))
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2
    probabilities = torch.softmax(logits.double(), -1)
    share = [0.0] * experts
    for row in logits.tolist():
        for expert in sorted(range(experts), key=lambda e: -row[e])[:top_k]:
            share[expert] += 1 / (tokens * top_k)
    expected = experts * sum(f * p for f, p in zip(share, probabilities.mean(0).tolist(), strict=True))
    got = balance_loss([logits], top_k).item()
    assert got == pytest.approx(expected, rel=1e-5)
    assert got == pytest.approx(load_balancing_loss_func((logits,), experts, top_k).item() / top_k, rel=1e-5)


def test_an_even_load_costs_one_a_collapsed_one_the_number_of_experts_and_layers_are_averaged():
    even, collapsed = torch.eye(4) * 50, torch.tensor([[50.0, 0, 0, 0]]).repeat(4, 1)
    assert balance_loss([even], 1).item() == pytest.approx(1)
    assert balance_loss([collapsed], 1).item() == pytest.approx(4)
    assert balance_loss([even, collapsed], 1).item() == pytest.approx(2.5)


def test_descent_moves_probability_away_from_a_crowded_expert():
    logits = torch.zeros(8, 4)
    logits[:6, 1] = 1.0
    logits[6:, 2] = 1.0
    logits.requires_grad_()
    balance_loss([logits], 1).backward()
    assert (logits.grad[:, 1] > 0).all() and (logits.grad[:, 0] < 0).all()


def test_load_adds_up_over_micro_steps_and_starts_anew():
    load = ExpertLoad(1)
    first, second = torch.eye(4)[[0, 0, 1]], torch.eye(4)[[0, 2, 2, 2, 2]]
    load.add([first, torch.eye(4)])
    load.add([second, torch.eye(4)])
    summary = load.take()
    assert summary.load == [pytest.approx([3 / 8, 1 / 8, 4 / 8, 0]), pytest.approx([1 / 4] * 4)]
    assert summary.dead == 1 and summary.max_share == pytest.approx(0.5)
    shares = torch.tensor([3 / 8, 1 / 8, 4 / 8], dtype=torch.float64)
    evenness = (-(shares * shares.log()).sum() / torch.tensor(4.0).log()).item()
    assert summary.entropy == pytest.approx((evenness + 1) / 2, rel=1e-6)
    assert load.take() is None
