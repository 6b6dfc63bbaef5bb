"""The plan's bytes are the bytes live engines hold, and its sums follow from the shapes."""

import pytest
import torch

from herd.llama4.experts import use_sparse_experts
from herd.llama4.model import build
from herd.llama4.plan import Setup, StateBytes, plan, state_bytes, tokens_per_day
from herd.llama4.specs import SPECS
from herd.run.errors import ConfigError

STATE_TOLERANCE = 0.01  # DeepSpeed pads its flat buffers
ACTIVATION_TOLERANCE = 0.03  # indices, scores and softmax statistics are left out


def saved_bytes(model, rows, length):
    """Return the bytes autograd holds for a forward, parameters left out, shared storages counted once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(torch.zeros(rows, length, dtype=torch.long))
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "overrides"), [("scout-nano", {}), ("scout-nano", {"num_experts_per_tok": 2}), ("maverick-nano", {})]
)
def test_activations_are_what_autograd_saves(name, overrides, precision):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = use_sparse_experts(build(name, overrides=overrides, dtype=dtype, seed=0))
    setup = Setup(precision=precision, sequence_length=128, micro_rows=4, chunk_tokens=512)
    estimate = plan(model.config, setup).activations
    assert estimate == pytest.approx(saved_bytes(model, 4, 128), rel=ACTIVATION_TOLERANCE)


def test_scout_on_512_ranks_follows_from_its_counts():
    config = SPECS["scout"].config()
    parameters, routed = 107_769_861_120, 96_636_764_160
    held = state_bytes(config, zero=1, expert_parallel=16, world_size=512)
    assert held.weights == 2 * (parameters - routed + routed // 16)
    assert held.moments == 2 * held.master == pytest.approx(8 * parameters / 512, rel=1e-6)
    assert held.gradients == pytest.approx(2 * parameters / 512, rel=1e-6)
    frozen = state_bytes(config, zero=3, expert_parallel=1, world_size=512, frozen=True, persistence_threshold=0)
    assert frozen == StateBytes(frozen.weights, 0, 0, 0)
    assert frozen.weights == pytest.approx(2 * parameters / 512, rel=1e-6)


def test_more_ranks_more_stages_or_more_expert_parallelism_never_cost_memory():
    config = SPECS["behemoth"].config()
    totals = [state_bytes(config, zero=z, expert_parallel=1, world_size=64).total for z in (1, 2, 3)]
    assert totals == sorted(totals, reverse=True)
    totals = [state_bytes(config, zero=2, expert_parallel=e, world_size=64).total for e in (1, 2, 8, 16)]
    assert totals == sorted(totals, reverse=True)
    totals = [state_bytes(config, zero=3, expert_parallel=1, world_size=w).total for w in (1, 8, 64, 512)]
    assert totals == sorted(totals, reverse=True)


def test_the_table_names_every_kind_and_the_sum_is_the_sum():
    result = plan(SPECS["maverick"].config(), Setup(zero=3, expert_parallel=64, world_size=512, chunk_tokens=512))
    parts = (result.state.total, result.buckets, result.gathered, result.activations, result.logits)
    assert result.bytes_per_rank == sum(parts) and all(parts)
    table = result.table()
    for word in ("386.5 G", "routed experts", "moments", "gathered layer", "FLOPs per token"):
        assert word in table
    frozen = plan(
        SPECS["maverick"].config(), Setup(zero=3, expert_parallel=64, world_size=512, frozen=True, chunk_tokens=512)
    )
    assert frozen.activations == frozen.buckets == 0
    assert 3 * frozen.flops_per_token == result.flops_per_token


def test_recomputing_keeps_layer_inputs_and_one_layer():
    config = SPECS["scout"].config()
    result = plan(config, Setup(world_size=16, sequence_length=2048, chunk_tokens=512))
    inputs = config.num_hidden_layers * config.hidden_size * 2 * 2048
    assert inputs < result.activations_recomputed < inputs + result.activations / 40


def test_a_day_of_512_devices():
    per_token = 6 * 17e9
    assert tokens_per_day(per_token, world_size=512, mfu=0.4, peak_flops=1e15) == pytest.approx(
        512 * 0.4 * 1e15 * 86400 / per_token
    )


@pytest.mark.parametrize(("expert_parallel", "world_size", "said"), [(3, 4, "1, 2, 4"), (32, 64, "1, 2, 4, 8, 16")])
def test_ranks_that_cannot_share_are_refused(expert_parallel, world_size, said):
    with pytest.raises(ConfigError, match=said):
        state_bytes(SPECS["scout"].config(), zero=1, expert_parallel=expert_parallel, world_size=world_size)
