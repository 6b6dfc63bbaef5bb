"""Routed feed-forward layers and lean steps against transformers' own Llama 4, in fp32."""

import copy

import pytest
import torch
from transformers import Llama4ForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4TextMLP, Llama4TextMoe

from quant.runtime.decoding import Steps, use_lean_steps
from quant.runtime.feed_forward import Mlp, route
from quant.runtime.linears import Plain
from tests.quant.tiny_models import build_llama4


def mlp(module: Llama4TextMLP) -> Mlp:
    gate_up = torch.cat([module.gate_proj.weight, module.up_proj.weight]).detach()
    return Mlp(Plain(gate_up), Plain(module.down_proj.weight.detach()), module.activation_fn)


def routed(moe: Llama4TextMoe) -> Llama4TextMoe:
    """A sparse copy over the same weights."""
    moe, fused = copy.deepcopy(moe), moe.experts
    experts = [
        Mlp(Plain(gate_up.detach().T.contiguous()), Plain(down.detach().T.contiguous()), fused.act_fn)
        for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True)
    ]
    route(moe, experts=experts, shared=mlp(moe.shared_expert))
    return moe


def lean(model: Llama4ForCausalLM) -> Llama4ForCausalLM:
    """A copy that computes the same, its single-token steps leanly."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.feed_forward = routed(layer.feed_forward) if layer.is_moe_layer else mlp(layer.feed_forward)
    use_lean_steps(model.model)
    return model


@pytest.mark.parametrize("experts, top_k", [(4, 1), (128, 1), (4, 2)])
@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_routed_experts_equal_transformers_which_runs_them_all(experts, top_k, tokens):
    changes = {"num_local_experts": experts, "num_experts_per_tok": top_k, "num_hidden_layers": 1}
    moe = build_llama4(moe_every=1, **changes).float().model.layers[0].feed_forward
    hidden_TH = torch.randn(tokens, 64)
    with torch.inference_mode():
        (wanted_TH, wanted_TE), (found_TH, found_TE) = moe(hidden_TH), routed(moe)(hidden_TH)
    torch.testing.assert_close(found_TH, wanted_TH, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_TE, wanted_TE, atol=1e-5, rtol=1e-5)


def test_an_expert_without_tokens_does_not_run():
    moe = routed(build_llama4(moe_every=1).float().model.layers[0].feed_forward)
    ran = []
    for number, expert in enumerate(moe.experts):
        expert.down.product = lambda rows_TI, number=number, way=expert.down.product: ran.append(number) or way(rows_TI)
    hidden_TH = torch.randn(6, 64)
    with torch.inference_mode():
        logits_TE = moe(hidden_TH)[1]
    assert ran == sorted(set(logits_TE.argmax(1).tolist()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_chunk_size": 8},  # steps cross the borders of chunks
        {"floor_scale": 3, "attn_scale": 0.5},  # the temperature of layers without rotary embedding sets in at once
        {"attn_temperature_tuning": False},
        {"use_qk_norm": False},
        {"num_key_value_heads": 4},
        {"attention_bias": True},
    ],
)
@pytest.mark.parametrize("moe_every, rows", [(1, 1), (2, 2)])
def test_lean_steps_equal_transformers_forward(changes, moe_every, rows):
    model = build_llama4(moe_every=moe_every, **changes).float()
    input_BT = torch.randint(3, 128, (rows, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted_BTV = model(input_ids=input_BT).logits
        served = lean(model)
        output = served(input_ids=input_BT[:, :5], use_cache=True)
        found = [output.logits]
        for place in range(5, 30):
            token_B1 = input_BT[:, place : place + 1]
            output = served(input_ids=token_B1, past_key_values=output.past_key_values, use_cache=True)
            found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), wanted_BTV, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("call", ["padded", "hidden states", "several tokens"])
def test_what_is_no_plain_step_goes_transformers_way(call, monkeypatch):
    model = build_llama4(moe_every=1).float()
    served = lean(model)
    monkeypatch.setattr(Steps, "step", None)  # it must not be called
    input_BT = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(input_BT)
    mask_BT[0, :4] = 0 if call == "padded" else 1
    cut = 10 if call == "several tokens" else 11
    with torch.inference_mode():
        found = continued(served, input_BT, mask_BT, cut, hidden=call == "hidden states")
        wanted = continued(model, input_BT, mask_BT, cut, hidden=call == "hidden states")
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


def continued(model: Llama4ForCausalLM, input_BT, mask_BT, cut: int, *, hidden: bool) -> torch.Tensor:
    start = model(input_ids=input_BT[:, :cut], attention_mask=mask_BT[:, :cut], use_cache=True)
    rest = {"input_ids": input_BT[:, cut:], "attention_mask": mask_BT, "past_key_values": start.past_key_values}
    output = model(**rest, use_cache=True, output_hidden_states=hidden)
    return output.hidden_states[2] if hidden else output.logits
