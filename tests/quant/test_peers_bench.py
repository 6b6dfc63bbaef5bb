"""What the peers' table rests on: the way from the layout on disk to matrices and back, and the count of levels."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from benchmarks.peers_quant.protocol import kept_of, merge, split, unfuse

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def model() -> Llama4ForCausalLM:
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_local_experts=3, interleave_moe_layer_step=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Llama4ForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as when the benchmark runs
    return importlib.import_module("peers_quant.judge")


def test_matrices_go_back_where_they_came_from(model: Llama4ForCausalLM) -> None:
    tensors = model.state_dict()
    matrices = split(tensors)
    # One dense MLP, one shared expert and three experts of three projections each.
    assert len(matrices) == 15
    back = merge(tensors, matrices)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_changed_matrix_changes_its_own_weight_alone(model: Llama4ForCausalLM) -> None:
    tensors = model.state_dict()
    matrices = split(tensors)
    name = "model.layers.1.feed_forward.experts.2.up_proj"
    matrices[name] = matrices[name] + 1
    again = split(merge(tensors, matrices))
    assert [n for n in again if not torch.equal(again[n], split(tensors)[n])] == [name]


def test_weights_that_belong_nowhere_are_refused(model: Llama4ForCausalLM) -> None:
    tensors = model.state_dict()
    with pytest.raises(AssertionError, match="belong nowhere"):
        merge(tensors, split(tensors) | {"model.layers.9.mlp.up_proj": torch.zeros(2, 2)})


def test_unfused_experts_compute_the_same(model: Llama4ForCausalLM) -> None:
    ids_NT = torch.randint(3, 64, (2, 7))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        fused = model.float()(ids_NT).logits
        model.to(torch.bfloat16)
        unfuse(model)
        assert torch.allclose(model.float()(ids_NT).logits, fused, atol=1e-5)
    matrices = split(tensors)
    assert all(torch.equal(model.get_submodule(name).weight, matrices[name].float()) for name in matrices)
    assert not kept_of(model, tensors).keys() & {f"{name}.weight" for name in matrices}


def test_levels_are_counted_group_by_group(judge: ModuleType) -> None:
    weight_NK = torch.tensor([[0.0, 1.0, 1.0, -1.0, 5.0, 5.0, 5.0, 5.0]])
    assert judge.levels(weight_NK, 4) == 3
    assert judge.levels(weight_NK, 8) == 4
