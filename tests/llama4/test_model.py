"""Models built from specs: seeded, castable without harm, and shapes alone on the meta device."""

import pytest
import torch
from transformers import Llama4ForCausalLM

from herd.llama4.model import build, restore_rope
from herd.llama4.specs import SPECS

SMALL = {"vocab_size": 512}


def test_a_seed_fixes_the_weights_and_leaves_the_global_random_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build("scout-nano", overrides=SMALL, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = build("scout-nano", overrides=SMALL, seed=3), build("scout-nano", overrides=SMALL, seed=4)
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_no_seed_means_the_global_random_state():
    torch.manual_seed(5)
    first = build("scout-nano", overrides=SMALL)
    second = build("scout-nano", overrides=SMALL)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    torch.manual_seed(5)
    assert torch.equal(first.lm_head.weight, build("scout-nano", overrides=SMALL).lm_head.weight)


def test_the_weights_start_normal_with_the_configured_spread():
    model = build("maverick-nano", overrides=SMALL, seed=0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            spread = 1.0 if "embed_tokens" in name else 0.02
            assert parameter.std().item() == pytest.approx(spread, rel=0.1), name


def test_embeddings_that_are_the_head_too_start_small():
    model = build("scout-nano", overrides=SMALL | {"tie_word_embeddings": True}, seed=0)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_bf16_rounds_the_same_weights_and_keeps_rope_exact():
    exact, rounded = (build("scout-nano", overrides=SMALL, dtype=d, seed=0) for d in (torch.float32, torch.bfloat16))
    for (name, one), two in zip(exact.named_parameters(), rounded.named_parameters(), strict=True):
        assert two[1].dtype == torch.bfloat16 and torch.equal(one.bfloat16(), two[1]), name
    assert torch.equal(exact.model.rotary_emb.inv_freq, rounded.model.rotary_emb.inv_freq)
    assert rounded.config.dtype == torch.bfloat16


def test_rope_frequencies_rounded_by_a_cast_come_back_exactly():
    model = build("scout-nano", overrides=SMALL, seed=0)
    exact = model.model.rotary_emb.inv_freq.clone()
    model.bfloat16()
    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), exact)
    restore_rope(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", SPECS)
def test_every_spec_builds_on_the_meta_device(name):
    with torch.device("meta"):
        model = build(name, dtype=torch.bfloat16, seed=0)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_a_saved_model_loads_to_the_same_logits(tmp_path):
    model = build("maverick-nano", overrides=SMALL, dtype=torch.bfloat16, seed=0).eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(512, (2, 160), generator=torch.Generator().manual_seed(0))
    loaded = Llama4ForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
