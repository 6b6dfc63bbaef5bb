"""Llama 4 in DeepSpeed's AutoEP: the internals it leans on, one layer in this process, training on two ranks."""

import dataclasses
import inspect

import deepspeed
import pytest
import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets import base, registry
from safetensors.torch import load_file

from herd.llama4.expert_parallel import PRESET, experts_divisible, install_preset
from herd.llama4.model import build
from herd.llama4.specs import SPECS
from herd.run.deepspeed_config import autoep_section
from herd.run.errors import ConfigError
from tests.llama4.parallel_worker import CASES, CLIP, LR, make_batches, make_model

REVIEW = f"AutoEP changed in DeepSpeed {deepspeed.__version__}: review herd/llama4/expert_parallel.py"
# Six AdamW steps in fp32: other orders of summation in gradients and experts, nothing else.
LOSS_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-5
NAMES = [f"zero{zero}_ep{ep}" for zero, ep in CASES]


def test_the_internals_of_autoep_are_the_ones_this_was_written_for():
    assert isinstance(registry.PRESET_MODELS, dict) and isinstance(registry._PRESET_ADAPTERS, dict), REVIEW
    contract = {field.name for field in dataclasses.fields(base.ForwardContract)}
    assert {"return_router_logits", "capture_target", "moe_output_shape"} <= contract, REVIEW
    retarget = base.AutoEPPresetAdapter.retarget_transformers_output_recorders
    expected = ["self", "model", "spec", "replacement", "retargeted_keys", "remove_output_capture_hooks"]
    assert list(inspect.signature(retarget).parameters) == expected, REVIEW
    source = inspect.getsource(AutoEPMoELayer)
    for attribute in ("self.model_family", "self.ep_group", "self.ep_size", "self.shared_experts", "self.router"):
        assert attribute in source, f"{REVIEW}: no {attribute}"


def test_the_preset_is_found_by_model_type_and_installing_twice_changes_nothing():
    install_preset()
    before = dict(registry.PRESET_MODELS)
    install_preset()
    assert before == registry.PRESET_MODELS
    assert registry.preset_name_for_hf_model_type("llama4_text") == PRESET


@pytest.fixture
def replaced():
    """A maverick-nano and its copy whose MoE layers AutoEP replaced, all experts on this rank."""
    install_preset()
    plain, spread = (build("maverick-nano", overrides={"vocab_size": 512}, seed=0) for _ in range(2))
    autoep = AutoEP(spread, parse_autoep_config(autoep_section(1)))
    specs = autoep.ep_parser()
    autoep.replace_moe_layers(specs, ep_size=1, ep_rank=0)
    return plain, spread, specs


def test_autoep_reads_llama_4_as_it_is(replaced):
    plain, _, specs = replaced
    assert [spec.moe_module_name for spec in specs] == [f"model.layers.{i}.feed_forward" for i in (1, 3)]
    for spec in specs:
        assert (spec.num_experts, spec.top_k) == (128, 1)
        assert (spec.hidden_size, spec.ffn_hidden_size) == (plain.config.hidden_size, plain.config.intermediate_size)
        assert (spec.score_func, spec.score_apply, spec.route_norm) == ("sigmoid", "pre", False)
        assert spec.has_shared_experts and spec.moe_output_shape == "flat"


def test_a_replaced_model_has_the_same_logits_router_logits_and_gradients(replaced):
    plain, spread, _ = replaced
    tokens = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(0))
    one, two = (model(tokens, labels=tokens, output_router_logits=True) for model in (plain, spread))
    torch.testing.assert_close(two.logits, one.logits, rtol=0, atol=LOGIT_TOLERANCE)
    assert len(one.router_logits) == len(two.router_logits) == 2
    for expected, got in zip(one.router_logits, two.router_logits, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=LOGIT_TOLERANCE)
    one.loss.backward()
    two.loss.backward()
    expected, got = (model.model.layers[1].feed_forward for model in (plain, spread))
    gate_up = torch.cat([got.experts.w1.grad, got.experts.w3.grad], dim=1).transpose(1, 2)
    pairs = [
        (got.router.gate.weight.grad, expected.router.weight.grad),
        (gate_up, expected.experts.gate_up_proj.grad),
        (got.experts.w2.grad.transpose(1, 2), expected.experts.down_proj.grad),
        (spread.model.embed_tokens.weight.grad, plain.model.embed_tokens.weight.grad),
    ]
    for got_grad, expected_grad in pairs:
        torch.testing.assert_close(got_grad, expected_grad, rtol=1e-4, atol=1e-5 * expected_grad.abs().max().item())


@pytest.fixture(scope="module")
def alone():
    """Losses of transformers' own model with torch's AdamW, one process, all rows at once."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for batch in make_batches():
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_like_one_under_every_zero_stage_and_expert_split(name, two_ranks, alone):
    _, rank0, rank1 = two_ranks
    assert rank0[name]["losses"] == rank1[name]["losses"]
    assert rank0[name]["losses"] == pytest.approx(alone, abs=LOSS_TOLERANCE)
    assert min(alone) < alone[0] - 0.1  # the weights did move


@pytest.mark.parametrize("name", NAMES)
def test_gathered_weights_load_into_transformers_own_model_with_identical_logits(name, two_ranks):
    folder, rank0, rank1 = two_ranks
    state = load_file(folder / f"{name}.safetensors")
    expected = state.pop("expected_logits")
    model = make_model()
    started = model(make_batches()[0].chunk(2)[0]).logits
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        got = model(make_batches()[0].chunk(2)[0]).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=LOGIT_TOLERANCE)
    assert (got - started).abs().max() > 0.1
    assert not rank0[name]["others_got_none"] and rank1[name]["others_got_none"]


@pytest.mark.parametrize("name", NAMES)
def test_router_logits_are_tapped_and_recorded_under_deepspeed(name, two_ranks):
    for rank in two_ranks[1:]:
        assert rank[name]["tapped"] == rank[name]["recorded"] == [[96, 8], [96, 8]]


def test_experts_that_do_not_divide_are_refused_with_the_sizes_that_do():
    experts_divisible(SPECS["scout-nano"].config(), 4)
    experts_divisible(SPECS["maverick"].full_config(), 64)
    with pytest.raises(ConfigError, match=r"the 16 experts \(num_local_experts\) of scout; use one of 1, 2, 4, 8, 16$"):
        experts_divisible(SPECS["scout"].config(), 3, model="scout")
