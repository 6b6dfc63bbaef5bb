"""Published sizes, from the meta device: what the exports of a Scout and a Maverick take, cache included.

The cache is bf16; layers with chunked attention keep a chunk of 8192 tokens of it, every fourth layer all.
"""

from math import prod

import pytest

from herd.llama4.counts import kv_bytes
from herd.llama4.source import read_config
from quant.architectures import build_skeleton
from quant.plans import Plan, header_bytes, make_plan
from quant.schemes import Scheme
from quant.sources import ModelSource

USABLE = 0.9 * 80e9
"""Bytes of an 80 GB H100 that a server plans with (vLLM's default share)."""


@pytest.fixture(scope="module")
def configs() -> dict:
    configs = {name: read_config(name) for name in ("scout", "maverick")}
    for config in configs.values():
        config.architectures = ["Llama4ForCausalLM"]
    return configs


def plan_of(config, scheme: str, group_size: int = 128) -> Plan:
    return make_plan(ModelSource(build_skeleton(config, fused=True)), Scheme.named(scheme, group_size))


def per_rank(plan: Plan, ranks: int) -> float:
    """Bytes on each of several GPUs: matrices are cut among them, norms and routers lie on all."""
    copied = [name for name, (_, shape) in plan.kept.items() if len(shape) == 1 or name.endswith("router.weight")]
    replicated = sum(header_bytes(plan.kept[name]) for name in copied)
    return replicated + (plan.bytes_after - replicated) / ranks


def test_the_plans_have_the_published_sizes(configs):
    scout = plan_of(configs["scout"], "int4")
    assert scout.all_weights == 107_769_861_120  # 109 B with the vision model
    assert scout.bytes_before == 2 * scout.all_weights
    weights = 48 * 5120 * 8192 * 3 * (16 + 1)  # experts and the shared one of every layer
    assert scout.quantised_weights == weights
    shapes = 16 * 48 * 3 * (16 + 1)
    assert scout.bytes_after == weights * (4 + 16 / 128) / 8 + shapes + 2 * (scout.all_weights - weights)


@pytest.mark.parametrize("scheme, group_size", [("int4", 128), ("int4", "channel")])
def test_a_scout_in_int4_fits_one_h100_with_128k_tokens(configs, scheme: str, group_size):
    plan, cache = plan_of(configs["scout"], scheme, group_size), kv_bytes(configs["scout"], 131_072)
    assert cache == 2 * 8 * 128 * 2 * (36 * 8192 + 12 * 131_072)
    assert plan.bytes_after + cache <= USABLE
    assert plan.bytes_before > 2 * 80e9


def test_a_scout_in_fp8_does_not_fit_one_h100(configs):
    assert plan_of(configs["scout"], "fp8").bytes_after > 80e9


def test_a_maverick_in_fp8_fits_eight_h100_with_a_million_tokens(configs):
    plan, cache = plan_of(configs["maverick"], "fp8"), kv_bytes(configs["maverick"], 1_000_000)
    assert per_rank(plan, 8) + cache / 8 <= USABLE  # a key-value head each
    assert plan.bytes_after == sum(prod(shape) * dtype.itemsize for dtype, shape in plan.headers().values())
    assert plan.bytes_before / 8 > 80e9
