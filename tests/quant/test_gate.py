"""The gate passes what is sound and refuses every kind of damage, naming it."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quant
from quant import gate
from quant.checks import digest_stored
from quant.gate_process import GateProcess
from quant.probes import Probe, take_probe
from quant.reports import Report
from tests.quant.runtime.conftest import byte_tokenizer

LAYER = "model.layers.1.feed_forward."
EXPERT = LAYER + "experts.2.down_proj"


@dataclass
class Sound:
    folder: Path
    probe: Probe


@pytest.fixture(scope="module")
def sound(models: dict, gate: GateProcess, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    quantized = quant.quantize(models["scout"], scheme="int4", group_size=32)
    folder = tmp_path_factory.mktemp("exports") / "sound"
    quant.export(quantized, folder, gate=gate)
    return Sound(folder, take_probe(quantized.model, digest_stored(folder)))


def damage(sound: Sound, to: Path, change: Callable[[dict], None], *, known_bytes: bool = True) -> Report:
    """The report on a copy whose tensors went through `change`; without known_bytes only the model is compared."""
    shutil.copytree(sound.folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    stored = sound.probe.stored if known_bytes else {}
    return gate.inspect(to, Probe(sound.probe.input_BT, sound.probe.logits_BTV, stored, sound.probe.weights))


def reconfigure(sound: Sound, to: Path, change: Callable[[dict], None]) -> Report:
    """The report on a copy whose quantization_config went through `change`."""
    shutil.copytree(sound.folder, to)
    config = json.loads((to / "config.json").read_text())
    change(config["quantization_config"])
    (to / "config.json").write_text(json.dumps(config))
    return gate.inspect(to, sound.probe)


def verdicts(report: Report) -> dict[str, bool]:
    return {check.name: check.passed for check in report.checks}


def test_a_sound_folder_passes_every_check(sound: Sound):
    report = gate.inspect(sound.folder, sound.probe)
    assert report.passed, report.reason
    assert list(verdicts(report)) == [
        "configuration", "tokenizer", "tensors", "servable", "names", "stored bytes", "reload", "weights", "logits",
        "generation",
    ]  # fmt: skip
    assert report.facts["quantised_layers"] == 4 * (4 + 1) * 3


def test_a_sound_folder_passes_without_a_probe(sound: Sound):
    report = gate.inspect(sound.folder)
    assert report.passed, report.reason


def test_the_report_survives_its_own_json(sound: Sound):
    report = gate.inspect(sound.folder)
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert Report.from_json(json.loads((sound.folder / "gate.json").read_text())).files == report.files


def test_a_removed_tensor_is_refused(sound: Sound, tmp_path: Path):
    report = damage(sound, tmp_path / "copy", lambda tensors: tensors.pop(f"{EXPERT}.weight_scale"))
    assert f"{EXPERT}.weight_scale is missing" in report.reason


def test_a_renamed_tensor_is_refused(sound: Sound, tmp_path: Path):
    def rename(tensors: dict) -> None:
        tensors[LAYER + "experts.gate_up_proj_packed"] = tensors.pop(LAYER + "experts.0.gate_proj.weight_packed")

    report = damage(sound, tmp_path / "copy", rename)
    assert LAYER + "experts.0.gate_proj.weight_packed is missing" in report.reason
    assert LAYER + "experts.gate_up_proj_packed is unexpected" in report.reason
    assert not verdicts(report)["names"]


def test_a_layer_stored_otherwise_than_the_configuration_says_is_named_once(sound: Sound, tmp_path: Path):
    report = reconfigure(sound, tmp_path / "copy", lambda section: section["ignore"].append(EXPERT))
    detail = next(check.detail for check in report.checks if check.name == "tensors")
    assert detail == f"{EXPERT}.weight_packed is stored though config.json ignores {EXPERT}"


def test_an_unquantised_expert_is_refused(sound: Sound, tmp_path: Path):
    def unquantise(tensors: dict) -> None:
        for suffix in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[f"{EXPERT}.{suffix}"]
        tensors[f"{EXPERT}.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)

    report = damage(sound, tmp_path / "copy", unquantise)
    assert f"{EXPERT} is stored as {EXPERT}.weight but config.json says it is quantised" in report.reason


def flip_one_scale(tensors: dict) -> None:
    tensors[f"{EXPERT}.weight_scale"][0, 0] *= -1


def test_a_flipped_scale_is_refused_by_its_bytes(sound: Sound, tmp_path: Path):
    report = damage(sound, tmp_path / "copy", flip_one_scale)
    assert f"stored bytes: {EXPERT}.weight_scale differs" in report.reason


def test_a_flipped_scale_is_refused_by_the_loaded_weights_whether_or_not_the_probe_uses_that_expert(
    sound: Sound, tmp_path: Path
):
    report = damage(sound, tmp_path / "copy", flip_one_scale, known_bytes=False)
    assert f"weights: {EXPERT}.weight differs" in report.reason


def test_a_change_the_logits_show_is_refused_by_them(sound: Sound, tmp_path: Path):
    name = LAYER + "shared_expert.up_proj.weight_packed"
    report = damage(sound, tmp_path / "copy", lambda tensors: tensors[name].bitwise_not_(), known_bytes=False)
    assert "logits: differ by up to" in report.reason


def test_nan_is_refused_without_a_probe(sound: Sound, tmp_path: Path):
    shutil.copytree(sound.folder, tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    tensors[LAYER + "shared_expert.up_proj.weight_scale"][0] = torch.nan
    save_file(tensors, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    assert "logits: NaN or Inf" in gate.inspect(tmp_path / "copy").reason


def test_a_tensor_of_another_dtype_or_shape_is_refused(sound: Sound, tmp_path: Path):
    name = f"{EXPERT}.weight_scale"
    wider = damage(sound, tmp_path / "wider", lambda tensors: tensors.update({name: tensors[name].float()}))
    assert f"{name} is float32 [64, 2], expected bfloat16 [64, 2]" in wider.reason
    longer = damage(sound, tmp_path / "longer", lambda t: t.update({name: t[name].repeat(1, 2)}))
    assert f"{name} is bfloat16 [64, 4], expected bfloat16 [64, 2]" in longer.reason


def test_an_ignore_list_that_forgets_a_layer_is_refused(sound: Sound, tmp_path: Path):
    name = LAYER + "router"
    report = reconfigure(sound, tmp_path / "copy", lambda section: section["ignore"].remove(name))
    assert f"{name} is stored as {name}.weight but config.json says it is quantised" in report.reason


def test_an_ignore_list_with_a_quantised_layer_is_refused(sound: Sound, tmp_path: Path):
    report = reconfigure(sound, tmp_path / "copy", lambda section: section["ignore"].append(EXPERT))
    assert f"{EXPERT}.weight_packed is stored though config.json ignores {EXPERT}" in report.reason


def test_an_ignore_list_with_an_unknown_layer_is_refused(sound: Sound, tmp_path: Path):
    report = reconfigure(sound, tmp_path / "copy", lambda section: section["ignore"].append("model.layers.9.router"))
    assert "ignore lists model.layers.9.router, which is no linear layer" in report.reason


@pytest.mark.parametrize(
    "change",
    [
        lambda section: section.update(format="float-quantized"),
        lambda section: section["config_groups"]["group_0"]["weights"].update(group_size=64),
        lambda section: section["config_groups"]["group_0"]["weights"].update(symmetric=False),
        lambda section: section["config_groups"]["group_0"].update(targets=["Embedding"]),
        lambda section: section.update(config_groups={}),
    ],
)
def test_a_configuration_that_does_not_describe_the_tensors_is_refused(sound: Sound, tmp_path: Path, change: Callable):
    report = reconfigure(sound, tmp_path / "copy", change)
    assert not report.passed
    assert re.search("quantization_config|expected|weight_zero_point is missing", report.reason)


def test_a_quantised_router_is_refused(models: dict, sound: Sound, tmp_path: Path):
    name = LAYER + "router"

    def quantise(tensors: dict) -> None:
        weight = tensors.pop(f"{name}.weight")
        stored = quant.quantized.Scheme.named("int4", 32).compress(weight)
        tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in stored.items()})

    report = damage(sound, tmp_path / "copy", quantise)
    assert f"servable: {name} is quantised, but a router's rounding error" in report.reason


def test_a_truncated_export_is_refused(sound: Sound, tmp_path: Path):
    shutil.copytree(sound.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "bytes, its header describes" in gate.inspect(tmp_path / "copy", sound.probe).reason


def test_the_command_prints_every_check_and_its_exit_code_tells(sound: Sound, tmp_path: Path, capsys):
    assert gate.main([str(sound.folder)]) == 0
    assert capsys.readouterr().out.count("ok  ") == 8
    shutil.copytree(sound.folder, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").unlink()
    assert gate.main([str(tmp_path / "copy"), "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_a_file_that_changed_after_the_gate_is_named(sound: Sound, tmp_path: Path):
    folder = shutil.copytree(sound.folder, tmp_path / "copy")
    assert gate.inspect(folder).passed
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    report = gate.inspect(folder)
    assert "files: model.safetensors differs from gate.json; copy it again" in report.reason


def test_without_its_report_a_folder_does_not_pass(sound: Sound, tmp_path: Path):
    folder = shutil.copytree(sound.folder, tmp_path / "copy")
    (folder / "gate.json").unlink()
    assert "files: no gate.json, so that nothing tells" in gate.inspect(folder).reason


def test_a_tokenizer_that_is_gone_changed_broken_or_another_models_is_named(sound: Sound, tmp_path: Path):
    folder = shutil.copytree(sound.folder, tmp_path / "copy")
    byte_tokenizer().save_pretrained(folder)
    assert verdicts(gate.inspect(folder, sound.probe))["tokenizer"]
    pieces = json.loads((folder / "tokenizer.json").read_text())
    pieces["model"]["vocab"] = {piece: number + 100 for piece, number in pieces["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(pieces))
    assert "to a model of 128: another model's" in gate.inspect(folder, sound.probe).reason
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer: tokenizer " in gate.inspect(folder, sound.probe).reason
    report = json.loads((folder / "gate.json").read_text())
    report["files"]["tokenizer.json"] = "0" * 64
    (folder / "gate.json").write_text(json.dumps(report))
    assert "files: tokenizer.json differs from gate.json; copy it again" in gate.inspect(folder).reason
    (folder / "tokenizer.json").unlink()
    assert "files: tokenizer.json is missing; copy it again" in gate.inspect(folder).reason


def test_shards_beside_a_single_file_are_named_though_no_one_reads_them(sound: Sound, tmp_path: Path):
    folder = shutil.copytree(sound.folder, tmp_path / "copy")
    shard = shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    tensors = load_file(shard)
    flip_one_scale(tensors)
    save_file(tensors, shard, {"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, Path(shard).name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert digest_stored(folder) == sound.probe.stored  # transformers, too, prefers the single file
    reason = gate.inspect(folder).reason
    assert "model-00001-of-00001.safetensors, model.safetensors.index.json is not in gate.json" in reason


def test_a_gate_report_that_is_cut_short_is_named(sound: Sound, tmp_path: Path):
    folder = shutil.copytree(sound.folder, tmp_path / "copy")
    (folder / "gate.json").write_text((folder / "gate.json").read_text()[:60])
    assert "readable: " in gate.inspect(folder).reason and "gate.json cannot be read" in gate.inspect(folder).reason
