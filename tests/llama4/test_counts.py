"""Parameter, FLOP and cache counts against published sizes, hand arithmetic and brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from herd.llama4.counts import (
    KINDS,
    _mean_keys,
    count,
    forward_flops,
    kv_bytes,
    parameter_kind,
    parameter_shapes,
    training_flops,
)
from herd.llama4.model import build
from herd.llama4.specs import SPECS


def test_scout_counts_are_the_published_models_exact_integers():
    counts = count(SPECS["scout"].full_config())
    assert counts.total == 108_641_793_536
    assert counts.by_kind["routed_experts"] == 96_636_764_160
    assert counts.by_kind["dense_mlp"] == 0


def test_maverick_counts_are_the_published_models_exact_integers():
    counts = count(SPECS["maverick"].full_config())
    assert counts.total == 401_583_781_376
    assert counts.by_kind["routed_experts"] == 386_547_056_640


@pytest.mark.parametrize(
    ("name", "active", "bare", "vision"), [("scout", 17.17, 16.14, 18.04), ("maverick", 17.18, 16.15, 18.06)]
)
def test_both_activate_17_billion(name, active, bare, vision):
    counts = count(SPECS[name].full_config())
    billions = [n / 1e9 for n in (counts.active, counts.active_without_table, counts.active_with_vision)]
    assert billions == pytest.approx([active, bare, vision], abs=0.006)


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_kinds_follow_from_the_dimensions(name):
    c, kinds = SPECS[name].config(), count(SPECS[name].full_config()).by_kind
    layers, moe = c.num_hidden_layers, len(c.moe_layers)
    expert = 3 * c.hidden_size * c.intermediate_size
    assert kinds["embedding"] == kinds["head"] == c.vocab_size * c.hidden_size
    assert kinds["attention"] == layers * 2 * c.hidden_size * c.head_dim * (40 + 8)
    assert kinds["routed_experts"] == moe * c.num_local_experts * expert
    assert kinds["shared_experts"] == moe * expert
    assert kinds["dense_mlp"] == (layers - moe) * 3 * c.hidden_size * c.intermediate_size_mlp
    assert kinds["router"] == moe * c.num_local_experts * c.hidden_size
    assert kinds["norms"] == (2 * layers + 1) * c.hidden_size


def test_the_inferred_behemoth_meets_what_is_published():
    counts = count(SPECS["behemoth"].full_config())
    assert 1.9e12 < counts.total < 2.0e12
    assert counts.active == pytest.approx(288e9, rel=0.02)


def test_nano_sizes_stay_small():
    totals = {name: count(spec.config()).total for name, spec in SPECS.items() if name.endswith("-nano")}
    actives = {name: count(SPECS[name].config()).active for name in totals}
    assert 13e6 < totals["behemoth-nano"] < 17e6
    assert 4e6 < totals["scout-nano"] < 5e6
    assert totals["maverick-nano"] < 10e6
    assert actives["maverick-nano"] == pytest.approx(actives["scout-nano"], rel=0.1)


@pytest.mark.parametrize("name", SPECS)
def test_every_parameter_has_a_kind_and_a_built_model_has_those_parameters(name):
    shapes = parameter_shapes(SPECS[name].config())
    assert {parameter_kind(parameter) for parameter in shapes} <= set(KINDS)
    with torch.device("meta"):
        assert shapes == {n: p.shape for n, p in build(name).named_parameters()}


def test_a_tied_head_is_counted_once():
    counts = count(SPECS["scout-nano"].config(tie_word_embeddings=True))
    assert counts.by_kind["head"] == 0 and counts.active_without_table == counts.active


@given(length=st.integers(1, 80), chunk=st.none() | st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_mean_keys_is_the_mean_of_the_mask(length, chunk):
    seen = [sum(k <= q and (chunk is None or k // chunk == q // chunk) for k in range(length)) for q in range(length)]
    assert _mean_keys(length, chunk) == pytest.approx(sum(seen) / length)


def test_flops_match_a_count_of_the_real_forward():
    # transformers runs every expert on every token and every key under the mask, so count a model of one expert and
    # take the masked-out products off by hand: torch counts the full T x T square.
    config = {"num_local_experts": 1, "vocab_size": 512, "num_hidden_layers": 4}
    length = 64
    model = build("scout-nano", overrides=config, seed=0)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    c = model.config
    square = 4 * c.num_attention_heads * c.head_dim * length * c.num_hidden_layers
    seen = 4 * c.num_attention_heads * c.head_dim * (length + 1) / 2 * c.num_hidden_layers
    assert counter.get_total_flops() / length - square + seen == pytest.approx(forward_flops(c, length), rel=1e-6)
    assert training_flops(c, length) == 3 * forward_flops(c, length)


def test_the_kv_cache_at_ten_million_tokens_is_held_by_the_nope_layers():
    scout = SPECS["scout"].config()
    full = 12 * 2 * 8 * 128 * 2 * 10_000_000
    assert full == pytest.approx(491e9, rel=0.002)
    assert kv_bytes(scout, 10_000_000) == full + 36 * 2 * 8 * 128 * 2 * 8192
    assert kv_bytes(scout, 100, bytes_per_value=1) == 48 * 2 * 8 * 128 * 100
