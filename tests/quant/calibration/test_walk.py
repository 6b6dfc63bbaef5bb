"""Whole models, layer by layer: what is stored, what folding leaves alone, what calibration gains, bounded memory."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import quant
from herd.run.errors import ConfigError, DataError
from quant.calibration.ledger import Ledger
from quant.calibration.moments import measure
from quant.calibration.rows import CalibrationRows
from quant.calibration.settings import Calibration
from quant.calibration.tensors import CalibratedTensors
from quant.calibration.walk import Block, Walk
from quant.methods.awq import Awq
from quant.methods.choice import make_method
from quant.plans import make_plan
from quant.quantized import QuantizedModel
from quant.schemes import Scheme
from quant.sources import open_source
from tests.quant.tiny_models import build_llama

CALIBRATED = ("gptq", "gptq-gated", "awq", "signround")


@pytest.fixture(scope="module")
def rows() -> CalibrationRows:
    return CalibrationRows(torch.randint(0, 128, (24, 64), generator=torch.Generator().manual_seed(1)))


def quantise(folder: Path, method: str, rows: CalibrationRows, **more) -> QuantizedModel:
    calibration = Calibration(rows, first=24, **more)
    return quant.quantize(folder, scheme="int4", group_size=32, method=method, calibration=calibration)


def output_error(quantized: QuantizedModel, folder: Path, rows: CalibrationRows) -> float:
    """Squared distance of the last hidden states from the unquantised model's."""
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        return sum(
            (quantized.model.model(input_ids=part)[0] - exact.model(input_ids=part)[0]).float().square().mean().item()
            for part in rows.tokens_NT[:8].split(4)
        )


@pytest.mark.parametrize("method", CALIBRATED)
def test_from_memory_and_from_a_folder_the_tensors_are_the_same(models, folders, rows, method: str):
    here = quant.quantize(
        models["maverick"], scheme="int4", group_size=32, method=method, calibration=Calibration(rows, first=24)
    )
    there = quantise(folders["maverick"], method, rows)
    assert set(here.tensors) == set(there.tensors) == set(here.plan.headers())
    for name, header in here.plan.headers().items():
        tensor = there.tensors[name]
        assert (tensor.dtype, tuple(tensor.shape)) == header
        assert torch.equal(here.tensors[name], tensor), name


@pytest.mark.parametrize("method", ["gptq", "gptq-gated"])
@pytest.mark.parametrize("name", ["scout", "llama"])
def test_on_calibration_rows_gptq_is_closer_than_round_to_nearest(folders, rows, name: str, method: str):
    nearest = quant.quantize(folders[name], scheme="int4", group_size=32)
    calibrated = quantise(folders[name], method, rows)
    assert output_error(calibrated, folders[name], rows) < 0.9 * output_error(nearest, folders[name], rows)


def test_gated_refinement_changes_gate_and_up_alone_of_the_first_layer(folders, rows):
    plain, gated = (quantise(folders["scout"], method, rows).tensors for method in ("gptq", "gptq-gated"))
    first = [name for name in plain if name.startswith("model.layers.0.") and name.endswith("weight_packed")]
    changed = {name.split(".")[-2] for name in first if not torch.equal(plain[name], gated[name])}
    assert {"gate_proj", "up_proj"} <= changed
    names = [name for name in first if name.endswith((".gate_proj.weight_packed", ".up_proj.weight_packed"))]
    assert all(not torch.equal(plain[name], gated[name]) for name in names)


class Forced(Awq):
    """Any powers of two for factors."""

    def factors(self, consumers, grid):
        columns = consumers[0][0].shape[-1]
        return torch.exp2(torch.randint(-3, 4, (columns,), generator=torch.Generator().manual_seed(0)).float())


def biased_llama() -> PreTrainedModel:
    model = build_llama(mlp_bias=True)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.up_proj.bias)
    return model


@pytest.mark.parametrize("name", ["maverick", "llama", "biased"])
def test_folding_leaves_the_unquantised_function_as_it_is_to_the_bit(folders, rows, name: str):
    source = open_source(biased_llama() if name == "biased" else folders[name])
    plan = make_plan(source, Scheme.named("int4", 32))
    walk = Walk(plan, source, Forced(), rows, Ledger(None, {}), memory_bytes=10**9)
    for index in (0, 1):
        hidden_BTH = walk.decoder.embed(rows.tokens_NT[:4])
        with walk.decoder.layer(index) as layer, torch.no_grad():
            before = walk.decoder.run(index, layer, hidden_BTH)
            weights = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
            block = Block(walk, index, layer)
            block.fold(measure(walk.decoder, index, layer, [hidden_BTH], [x.name for x in walk.layers_of(index)]))
            moved = {key for key, tensor in layer.state_dict().items() if not torch.equal(tensor, weights[key])}
            assert torch.equal(walk.decoder.run(index, layer, hidden_BTH), before)
            left = {"self_attn.o_proj.weight", "mlp.gate_proj.bias", "mlp.down_proj.bias"}
            if name == "maverick":
                left = {key for key in weights if "self_attn" in key or key == "input_layernorm.weight"}
            assert moved == weights.keys() - left
            # Kept tensors that changed are written in place of those read.
            stored = {key.removeprefix(f"model.layers.{index}.") for key in block.tensors}
            assert stored == {key for key in moved if key.endswith(("norm.weight", "router.weight", "bias"))}


def test_awq_is_never_worse_than_no_scaling_on_its_own_objective(rows):
    generator = torch.Generator().manual_seed(5)
    weight_ENK = torch.randn(2, 16, 64, generator=generator)
    size_K = torch.logspace(-1, 1.5, 64)
    input_nK = torch.randn(300, 64, generator=generator) * size_K
    consumers = [(weight_ENK, (input_nK.T @ input_nK / 300).expand(2, 64, 64), torch.tensor([300.0, 10.0]))]
    grid, method = Scheme.named("int4", 32).grid, Awq()
    factor_K = method.factors(consumers, grid)
    assert method.error(factor_K, consumers, grid) < 0.9 * method.error(torch.ones(64), consumers, grid)
    assert torch.equal(factor_K.log2(), factor_K.log2().round())


def test_experts_without_a_token_are_rounded_to_nearest_and_reported(folders):
    same = CalibrationRows(torch.full((4, 256), 7))  # one token over and over: few experts see any
    quantized = quantise(folders["scout"], "gptq", same)
    nearest = quant.quantize(folders["scout"], scheme="int4", group_size=32)
    report = quantized.coverage()
    unseen = [name for name, expert in report["experts"].items() if expert["treatment"] == "nearest"]
    assert len(unseen) == report["summary"]["experts_without_tokens"] > 0
    for expert in unseen:
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = f"{expert}.{leaf}.weight_packed"
            assert torch.equal(quantized.tensors[name], nearest.tensors[name])


def test_hessians_in_chunks_give_what_hessians_at_once_give(folders, rows):
    whole = quantise(folders["scout"], "gptq", rows)
    chunked = quantise(folders["scout"], "gptq", rows, memory_bytes=1)  # one input at a time
    # Batches of matrices of another size round sums another way, which may tip a code and then others.
    for leaf in ("gate_proj", "up_proj"):
        name = f"model.layers.0.feed_forward.experts.1.{leaf}.weight_packed"
        assert (whole.tensors[name] == chunked.tensors[name]).float().mean() > 0.8
    errors = [output_error(each, folders["scout"], rows) for each in (whole, chunked)]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)


def test_more_rows_are_drawn_until_experts_have_their_quota(folders, rows):
    few = quant.quantize(
        folders["scout"], scheme="int4", group_size=32, method="gptq",
        calibration=Calibration(CalibrationRows(rows.tokens_NT.repeat(8, 1)), first=1, expert_tokens=0),
    )  # fmt: skip
    more = quant.quantize(
        folders["scout"], scheme="int4", group_size=32, method="gptq",
        calibration=Calibration(CalibrationRows(rows.tokens_NT.repeat(8, 1)), first=1, expert_tokens=500),
    )  # fmt: skip
    assert few.coverage()["summary"]["rows"] < more.coverage()["summary"]["rows"] <= 192


def test_too_few_rows_are_refused_before_anything_is_run(models, rows):
    source = open_source(models["llama"])
    message = "--calibration-rows 8: 512 tokens in rows of 64, .*give --calibration-rows 16 or more"
    with pytest.raises(ConfigError, match=message):
        few = Calibration(rows, first=8)
        CalibratedTensors(make_plan(source, Scheme.named("int4", 32)), source, make_method("gptq"), few)


def test_an_export_holds_the_coverage_and_says_how_it_was_made(folders, rows, gate, tmp_path):
    quantized = quantise(folders["maverick"], "gptq", rows, work=tmp_path / ".out.incomplete" / "layers")
    assert quant.export(quantized, tmp_path / "out", gate=gate).passed
    coverage = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert coverage["summary"]["experts"] == 8
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert (lineage["method"], lineage["calibration"]["rows"]) == ("gptq", 24)
    assert "GPTQ on calibration rows" in (tmp_path / "out" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_awq_export_passes_the_gate_with_its_folded_norms_and_router(folders, rows, gate, tmp_path):
    quantized = quantise(folders["scout"], "awq", rows)
    assert quant.export(quantized, tmp_path / "out", gate=gate).passed
    assert quant.load(tmp_path / "out")(input_ids=rows.tokens_NT[:1]).logits.isfinite().all()


def test_mistakes_are_told_before_any_work(models, rows):
    with pytest.raises(ConfigError, match="needs calibration rows"):
        quant.quantize(models["llama"], scheme="int4", group_size=32, method="gptq")
    with pytest.raises(ConfigError, match="use method rtn for fp8"):
        quant.quantize(models["llama"], scheme="fp8", method="hqq")
    with pytest.raises(ConfigError, match="unknown; use one of rtn"):
        quant.quantize(models["llama"], scheme="int4", group_size=32, method="gptqq")
    with pytest.raises(DataError, match="at least 1024"):
        CalibrationRows(torch.zeros(2, 8, dtype=torch.int64))


def test_every_method_has_a_class():
    from quant.methods.names import METHODS

    assert {name: make_method(name).calibrated for name in METHODS} == {n: k.calibrated for n, k in METHODS.items()}
