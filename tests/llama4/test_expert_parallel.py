"""Llama 4 in DeepSpeed's AutoEP: the internals it leans on, one layer in this process."""

import dataclasses
import inspect

import deepspeed
import pytest
import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets import base, registry

from herd.llama4.expert_parallel import PRESET, experts_divisible, install_preset
from herd.llama4.model import build
from herd.llama4.specs import SPECS
from herd.run.deepspeed_config import autoep_section
from herd.run.errors import ConfigError

REVIEW = f"AutoEP changed in DeepSpeed {deepspeed.__version__}: review herd/llama4/expert_parallel.py"
LOGIT_TOLERANCE = 1e-5


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


def test_experts_that_do_not_divide_are_refused_with_the_sizes_that_do():
    experts_divisible(SPECS["scout-nano"].config(), 4)
    experts_divisible(SPECS["maverick"].full_config(), 64)
    with pytest.raises(ConfigError, match=r"the 16 experts \(num_local_experts\) of scout; use one of 1, 2, 4, 8, 16$"):
        experts_divisible(SPECS["scout"].config(), 3, model="scout")
