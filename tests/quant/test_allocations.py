"""Allocations: several schemes in one export, never two in a set of layers that servers merge."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

import quant
from herd.run.errors import ConfigError
from quant.__main__ import check, export_lineage, main, parse
from quant.allocations import allocate, group_layers
from quant.calibration.rows import CalibrationRows
from quant.calibration.settings import Calibration
from quant.gate import inspect
from quant.gate_process import GateProcess
from quant.loading import load as load_reference
from quant.sections import read_section, section
from quant.tensor_files import TensorFiles

DENSE = [
    f"model.layers.{layer}.{leaf}"
    for layer in (0, 11)
    for leaf in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip
EXPERTS = [
    f"model.layers.{layer}.feed_forward.experts.{expert}.{leaf}"
    for layer in (1, 10)
    for expert in (0, 1, 12)
    for leaf in ("gate_proj", "up_proj", "down_proj")
]
# The sets servers merge, written out by hand.
MERGED = [
    *([f"model.layers.{n}.self_attn.{leaf}_proj" for leaf in "qkv"] for n in (0, 11)),
    *([f"model.layers.{n}.mlp.{leaf}_proj" for leaf in ("gate", "up")] for n in (0, 11)),
    *([name for name in EXPERTS if name.startswith(f"model.layers.{n}.")] for n in (1, 10)),
]
LABELS = ("int4-g32", "int4-g128", "int8", "int8-weights-g64", "fp8", "nvfp4", "bf16")
MIXED = {
    "*": "int4-g32",
    "*.layers.0.*.experts": "fp8",
    "*.layers.1.*.experts": "int8",
    "*.layers.2.*.experts": "int4-g64",
    "*.layers.1.feed_forward.shared_expert.down_proj": "bf16",
    "*.layers.3.*.experts": "bf16",
}


@given(st.data())
def test_whatever_is_chosen_layers_that_servers_merge_have_one_scheme(data):
    groups = list(group_layers([*DENSE, *EXPERTS]))
    assert len(groups) == 10
    choices = {group: data.draw(st.sampled_from(LABELS)) for group in groups}
    if set(choices.values()) == {"bf16"}:
        return
    allocation, kept = allocate(choices, [*DENSE, *EXPERTS])
    for names in MERGED:
        assert len({"bf16" if name in kept else allocation.of(name).label for name in names}) == 1
    for group, names in group_layers([*DENSE, *EXPERTS]).items():
        assert choices[group] == ("bf16" if names[0] in kept else allocation.of(names[0]).label)
    assert read_section(section(allocation, kept)) == (allocation, kept, "")


@pytest.mark.parametrize(
    "content, fault",
    [
        ({"quant_method": "compressed-tensors", "ignore": "lm_head"}, "ignore = 'lm_head' is no list of layers"),
        ({"quant_method": "bitsandbytes", "llm_int8_skip_modules": 5}, "llm_int8_skip_modules = 5 is no list"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": 1, "b": 2}}, "maps no groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": 1}, "b": {}}}, "has a group"),
        ({"quant_method": ["fp8"]}, "describes no scheme"),
    ],
)
def test_sections_of_the_wrong_kind_are_told(content: dict, fault: str):
    allocation, _, said = read_section(content)
    assert allocation is None and fault in said


@pytest.mark.parametrize(
    "choices, fault",
    [
        ({"*": "int4-g63"}, "'int4-g63' is no choice; the nearest is int4-g64"),
        ({"*": "int4-g64", "*.layers.0.mlp.gate_proj": "fp8"}, "nearest is 'model.layers.0.mlp.gate_proj+up_proj'"),
        ({"*.mlp.*": "fp8"}, "nothing is said about 'model.layers.0.self_attn.q_proj+k_proj+v_proj'"),
        ({"*": "bf16"}, "every group stays in bf16"),
        ({"*": "fp8-static"}, "'fp8-static' is no choice"),
        ({"*": "int4-asym-g32", "*.mlp.*": "fp8"}, "'int4-asym-g32' is no choice"),
    ],
)
def test_choices_that_cannot_be_are_refused_with_the_nearest(choices, fault):
    with pytest.raises(ConfigError) as refusal:
        allocate(choices, DENSE)
    assert fault in str(refusal.value)


@pytest.fixture(scope="module")
def exported(models: dict, gate: GateProcess, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    quantized = quant.quantize(models["scout"], allocation=MIXED)
    folder = tmp_path_factory.mktemp("mixed") / "scout-mixed"
    assert quant.export(quantized, folder, gate=gate).passed
    return quantized, folder


def logits(model: PreTrainedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens_BT).logits


def divergence(from_BTV: torch.Tensor, to_BTV: torch.Tensor) -> torch.Tensor:
    """KL in nats at each position [B, T]."""
    from_BTV, to_BTV = (logits_BTV.double().log_softmax(-1) for logits_BTV in (from_BTV, to_BTV))
    return (from_BTV.exp() * (from_BTV - to_BTV)).sum(-1)


def test_one_folder_holds_several_schemes_and_every_loader_computes_the_same(exported, tokens_BT):
    quantized, folder = exported
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == 4
    reference_BTV = logits(quantized.model, tokens_BT)
    served = quant.load(folder)
    kinds = {type(module).__name__ for module in served.model.layers[1].modules()}
    assert {"Int8", "Int4", "Plain"} <= kinds
    for model in (served, load_reference(folder)):
        # Kernels sum in another order, and bf16's last bit decides a tie of two experts: that position alone moves.
        assert divergence(reference_BTV, logits(model, tokens_BT)).median() < 1e-4
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    name = "model.layers.2.feed_forward.experts.3.up_proj"
    logits(plain, tokens_BT)  # unpacks the weights
    assert torch.equal(plain.get_submodule(name).weight, quantized.model.get_submodule(name).weight)


def test_the_bytes_foretold_are_the_bytes_stored(exported):
    quantized, folder = exported
    stored = TensorFiles(folder)
    assert sum(tensor.nbytes for tensor in stored.values()) == quantized.plan.bytes_after


@pytest.mark.parametrize("method, labels", [("awq", ("int4-g32", "fp8")), ("gptq", ("fp8", "int8"))])
def test_a_method_that_does_not_fit_the_schemes_is_refused(models, method, labels):
    with pytest.raises(ConfigError, match=f"method = {method}"):
        quant.quantize(models["scout"], allocation={"*": labels[0], "*.experts": labels[1]}, method=method)


def test_one_label_everywhere_is_the_uniform_export(models):
    uniform = quant.quantize(models["llama"], scheme="int4", group_size=32)
    allocated = quant.quantize(models["llama"], allocation={"*": "int4-g32"})
    assert allocated.plan.allocation == uniform.plan.allocation
    assert allocated.plan.headers() == uniform.plan.headers()


def test_the_gate_refuses_a_folder_whose_groups_split_an_expert_bank(exported, tmp_path):
    _, source = exported
    folder = shutil.copytree(source, tmp_path / "split")
    content = json.loads((folder / "config.json").read_text())
    groups = content["quantization_config"]["config_groups"]
    (pattern,) = groups["group_0"]["targets"]
    groups["group_0"]["targets"] = [pattern.replace(r"\d+", "[012]")]
    groups["group_1"]["targets"] += [pattern.replace(r"\d+", "3")]
    (folder / "config.json").write_text(json.dumps(content))
    report = inspect(folder)
    assert "model.layers.0.feed_forward.experts: fp8 and int4-g32, which servers cannot merge" in report.reason


def test_a_calibrated_method_chooses_the_codes_of_integer_schemes_and_leaves_the_others(models, tmp_path):
    tokens_NT = torch.randint(0, 128, (16, 64), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(CalibrationRows(tokens_NT), first=16, expert_tokens=0)
    nearest = quant.quantize(models["scout"], allocation=MIXED)
    learned = quant.quantize(models["scout"], allocation=MIXED, method="gptq", calibration=calibration)
    expert = "model.layers.{}.feed_forward.experts.0.down_proj.{}"
    assert not torch.equal(*(q.tensors[expert.format(2, "weight_packed")] for q in (nearest, learned)))
    for layer, suffix in ((0, "weight"), (1, "weight")):
        first, second = (q.tensors[expert.format(layer, suffix)] for q in (nearest, learned))
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))


@pytest.mark.parametrize(
    "content, more, fault",
    [
        ('{"*": "int4-g31"}', (), "the nearest is int4-g32"),
        ('["int4"]', (), "must map groups to schemes"),
        ("{", (), "cannot be read"),
        ('{"*": "fp8"}', ("--group-size", "32"), "--group-size 32: an allocation says it itself"),
    ],
)
def test_mistakes_in_an_allocation_are_one_line_and_exit_code_2(folders, tmp_path, capsys, content, more, fault):
    (tmp_path / "bits.json").write_text(content)
    words = ["--model", str(folders["scout"]), "--allocation", str(tmp_path / "bits.json")]
    assert main([*words, "--out", str(tmp_path / "out"), "--no-tracking", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and fault in line
    assert not (tmp_path / "out").exists()


def test_the_command_line_plans_an_allocation_and_the_export_remembers_it(folders, tmp_path: Path, capsys):
    (tmp_path / "bits.json").write_text(json.dumps(MIXED))
    words = ["--model", str(folders["scout"]), "--allocation", str(tmp_path / "bits.json")]
    words += ["--out", str(tmp_path / "out"), "--no-tracking", "--dry-run", "--json"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["scheme"] == "mixed"
    assert plan["kept"]["model.layers.3.feed_forward.experts.2.up_proj"] == "the allocation says so"
    options = parse(words)
    check(options)
    lineage = export_lineage(options, {"data_config": {"source": "texts"}})
    assert f"--allocation {tmp_path / 'bits.json'} --out" in lineage["command"]
    assert lineage["data_config"] == {"source": "texts"}  # the source may move
