"""What the specs promise: each model's signature, and one clear line for an override that cannot be."""

import subprocess
import sys

import pytest

from herd.llama4.specs import SPECS, find_spec
from herd.run.errors import ConfigError

NANO = [name for name in SPECS if name.endswith("-nano")]


def test_importing_the_specs_loads_no_torch():
    code = "import sys, herd.llama4; herd.llama4.SPECS['scout']; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_scout_and_maverick_claim_to_be_published_and_behemoth_says_inferred():
    assert {name for name, spec in SPECS.items() if spec.published} == {"scout", "maverick"}
    assert "INFERRED" in SPECS["behemoth"].note


@pytest.mark.parametrize("name", SPECS)
def test_every_fourth_layer_is_full_attention_without_rope_and_chunks_suit_a_paged_cache(name):
    config = SPECS[name].config()
    expected = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    assert config.no_rope_layers == expected and 0 in expected
    assert config.layer_types == ["chunked_attention" if rope else "full_attention" for rope in expected]
    assert config.attention_chunk_size % 128 == 0
    assert config.attn_temperature_tuning and config.floor_scale == config.attention_chunk_size


@pytest.mark.parametrize("family", ["scout", "maverick", "behemoth"])
def test_a_nano_form_keeps_its_models_signature(family):
    real, nano = SPECS[family].config(), SPECS[f"{family}-nano"].config()
    for field in ("num_local_experts", "num_experts_per_tok", "interleave_moe_layer_step", "use_qk_norm", "attn_scale"):
        assert getattr(real, field) == getattr(nano, field), field


@pytest.mark.parametrize("name", NANO)
def test_nano_widths_take_quantisation_groups_of_64(name):
    config = SPECS[name].config()
    for field in ("hidden_size", "intermediate_size", "intermediate_size_mlp"):
        assert getattr(config, field) % 64 == 0
    assert config.num_attention_heads * config.head_dim % 64 == 0


def test_scout_scales_its_rope_and_maverick_does_not():
    scout, maverick = SPECS["scout"].config().rope_parameters, SPECS["maverick"].config().rope_parameters
    assert (scout["rope_type"], scout["factor"], scout["original_max_position_embeddings"]) == ("llama3", 16.0, 8192)
    assert maverick["rope_type"] == "default" and maverick["rope_theta"] == scout["rope_theta"] == 500000.0


def test_overrides_reach_the_configuration_and_layer_lists_follow():
    config = SPECS["maverick-nano"].config(num_hidden_layers=8, vocab_size=512, eos_token_id=7)
    assert (config.vocab_size, config.eos_token_id, config.moe_layers) == (512, 7, [1, 3, 5, 7])
    assert len(config.layer_types) == 8


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"hiden_size": 64}, "hidden_size"),
        ({"num_key_value_heads": 3}, "1, 2, 4"),
        ({"head_dim": 33}, "even"),
        ({"num_hidden_layers": 0}, "above 0"),
        ({"num_hidden_layers": "4"}, "'4'"),
        ({"hidden_size": True}, "True"),
        ({"num_experts_per_tok": 17}, "num_local_experts = 16"),
        ({"eos_token_id": 4096}, "0..4095"),
        ({"attn_scale": "big"}, "attn_scale"),
        ({"rope_parameters": {"rope_type": "nonsense"}}, "llama3"),
    ],
)
def test_a_bad_override_is_one_line_that_names_the_mend(overrides, said):
    with pytest.raises(ConfigError) as caught:
        SPECS["scout-nano"].config(**overrides)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_spec_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="scout-nano"):
        find_spec("scout_nano")
