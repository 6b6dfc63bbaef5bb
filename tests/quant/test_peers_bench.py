"""What the peers' table rests on: the way from the layout on disk to matrices and back, and the count of levels."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import Llama4ForCausalLM, Llama4TextConfig

from benchmarks.peers_quant.protocol import kept_of, merge, split, unfuse
from benchmarks.routes import routes
from herd.llama4 import use_sparse_experts

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
def bench_models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("quantisation_models")


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


@pytest.mark.parametrize("sparse", [False, True])
def test_forced_routes_are_those_of_the_other_model(model: Llama4ForCausalLM, sparse: bool) -> None:
    if sparse:
        use_sparse_experts(model)
    model.float()
    ids_NT, noted = torch.randint(3, 64, (4, 7)), []
    moe, hidden_TH = model.model.layers[1].feed_forward, torch.randn(14, 32)
    with torch.no_grad():
        with routes(model, noted, replay=False):
            before = [model(part_NT).logits for part_NT in ids_NT.split(2)]
        with routes(model, noted, replay=True):
            again = [model(part_NT).logits for part_NT in ids_NT.split(2)]
        assert all(map(torch.equal, before, again))
        # Other tokens, whose own choice is another: the noted experts answer, with the scores of these tokens.
        logits_TE = torch.nn.functional.linear(hidden_TH, moe.router.weight)
        assert (logits_TE.argmax(1) != noted[0][:, 0]).any()
        with routes(model, noted, replay=True):
            forced_TH = moe(hidden_TH)[0]
        expected_TH = moe.shared_expert(hidden_TH)
        for t, expert in enumerate(noted[0][:, 0].tolist()):
            gate_up_HG, down_IH = moe.experts.gate_up_proj[expert], moe.experts.down_proj[expert]
            gate_I, up_I = (logits_TE[t, expert].sigmoid() * hidden_TH[t] @ gate_up_HG).chunk(2)
            expected_TH[t] += torch.nn.functional.silu(gate_I) * up_I @ down_IH
        assert torch.allclose(forced_TH, expected_TH, atol=1e-6)


def test_the_mean_over_models_is_that_of_the_logarithms(bench_models: ModuleType) -> None:
    ratios = [0.9, 1.1, 1.3]
    expected = stats.ttest_1samp(np.log(ratios), 0).confidence_interval(0.95)
    found = bench_models.mean_ratio(ratios)
    assert found["ratio"] == pytest.approx(stats.gmean(ratios))
    assert found["ratio_ci95"] == pytest.approx(list(np.exp(expected)))
    assert bench_models.mean_ratio([0.9])["ratio_ci95"] is None


def test_students_of_two_runs_have_names_of_their_own(bench_models: ModuleType) -> None:
    names = {bench_models.label(Path("runs") / run / "students" / "scout") for run in ("a", "b")}
    assert names == {"a/scout", "b/scout"}
    assert bench_models.label(Path("models/scout")) == "scout"
