"""A model checked unit by unit is checked as well as a whole one, in the memory of one unit."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quant
from quant import exports, gate, memory
from quant.calibration import estimate
from quant.calibration.estimate import foresee
from quant.checks import LAYERWISE, run_checks
from quant.exports import export
from quant.methods.choice import make_method
from quant.probes import Probe, take_probe
from quant.quantized import QuantizedModel
from quant.reports import Check, Report
from quant.streaming import stream_probe, stream_reference
from tests.quant.tiny_models import BUILDERS, WIDE_BUILDERS, build_llama, build_multimodal

CASES = [
    ("scout", {"scheme": "int4", "group_size": 32}),
    ("scout", {"scheme": "int4", "group_size": 32, "container": "gguf"}),
    ("maverick", {"scheme": "fp8"}),
    ("wide-scout", {"scheme": "nf4-double"}),
    ("wide-llama", {"scheme": "fp8-block", "container": "fine-grained-fp8"}),
    ("tied", {"scheme": "int4-asym", "group_size": 32}),
    ("multimodal", {"scheme": "int8"}),
]
LAYER = "model.layers.1.feed_forward."


@dataclass
class Exported:
    """An export that was checked layer by layer on its way, and what it must compute."""

    quantized: QuantizedModel
    folder: Path
    report: Report
    probe: Probe


class LayerwiseGate:
    """The gate as a large model meets it, in this process."""

    def inspect(self, folder: Path, probe: Probe) -> Report:
        self.probe = probe
        return gate.inspect(folder, probe, whole=False)


def export_streamed(name: str, settings: dict, folder: Path, *, shard_bytes: int = 10**9) -> Exported:
    builders = BUILDERS | WIDE_BUILDERS | {"tied": lambda: build_llama(tied=True), "multimodal": build_multimodal}
    quantized, checker = quant.quantize(builders[name](), **settings), LayerwiseGate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "fits", lambda needed: False)
        report = export(quantized, folder, gate=checker, shard_bytes=shard_bytes)
    return Exported(quantized, folder, report, checker.probe)


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.set_num_threads(1)
    return export_streamed(*CASES[0], tmp_path_factory.mktemp("streamed") / "scout")


def same_probe(found: Probe, wanted: Probe) -> bool:
    return torch.equal(found.logits_BTV, wanted.logits_BTV) and found.weights == wanted.weights


@pytest.mark.parametrize("name, settings", CASES)
def test_both_ways_find_the_same_bits_and_pass_the_same_folders(name, settings, tmp_path):
    torch.set_num_threads(1)
    made = export_streamed(name, settings, tmp_path / "out", shard_bytes=100_000)
    assert same_probe(made.probe, take_probe(made.quantized.model, {}))
    whole = gate.inspect(made.folder, made.probe, whole=True)
    assert whole.passed, whole.reason
    assert made.report.passed
    assert [check.name for check in whole.checks] == [check.name for check in made.report.checks]


def test_the_report_and_the_card_say_how_it_was_checked(scout):
    assert scout.report.facts["checked"] == LAYERWISE
    assert f"mismatched, {LAYERWISE}" in scout.report.to_text()
    assert "read back layer by layer" in (scout.folder / "README.md").read_text()
    assert gate.inspect(scout.folder).facts["checked"] == "whole"


def found_in(folder: Path, change: Callable[[dict], None], probe: Probe, *, whole: bool) -> dict[str, Check]:
    """The checks on the folder with `change` to its tensors, which is taken back."""
    path = folder / "model.safetensors"
    before = path.read_bytes()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    try:
        return {check.name: check for check in run_checks(folder, probe, whole=whole)}
    finally:
        path.write_bytes(before)


def flip(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors[name][0].neg_()


def rename(name: str, other: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({other: tensors.pop(name)})


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("expert", ["shared_expert", "experts.2"])
def test_a_changed_scale_of_any_expert_is_found_either_way(scout, whole, expert):
    name = f"{LAYER}{expert}.down_proj"
    checks = found_in(scout.folder, flip(f"{name}.weight_scale"), scout.probe, whole=whole)
    assert checks["weights"].detail == f"{name}.weight differs from the in-memory model"
    if expert == "shared_expert":
        assert not checks["logits"].passed


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_changed_unquantised_tensor_is_found_either_way(scout, whole, name):
    checks = found_in(scout.folder, flip(name), scout.probe, whole=whole)
    assert checks["weights"].detail == f"{name} differs from the in-memory model"
    assert not checks["logits"].passed


@pytest.mark.parametrize("name", [f"{LAYER}experts.2.up_proj.weight_scale", "model.layers.3.input_layernorm.weight"])
def test_a_misnamed_tensor_is_reported_as_transformers_reports_it(scout, name):
    other = name.replace("up_proj", "upper_proj").replace("input_", "")
    reload = {
        whole: found_in(scout.folder, rename(name, other), scout.probe, whole=whole)["reload"]
        for whole in (True, False)
    }
    assert not reload[True].passed
    assert reload[True].detail == reload[False].detail


def test_one_unit_at_a_time_is_in_memory(scout):
    running = stream_reference(scout.quantized.plan, scout.quantized.tensors)
    fill, seen = running._fill, []

    def counting(unit) -> None:
        held = sum(t.nbytes for t in running._model.parameters() if not t.is_meta)
        fill(unit)
        seen.append((unit.name, held))

    running._fill = counting
    running.logits(scout.probe.input_BT)
    assert [name for name, _ in seen] == [
        "model.embed_tokens", *(f"model.layers.{n}" for n in range(4)), "model.norm", "lm_head",
    ]  # fmt: skip
    assert not any(held for _, held in seen)


def test_units_that_text_does_not_reach_are_digested_too(scout):
    probe = stream_probe(scout.quantized.plan, scout.quantized.tensors, {})
    running = stream_reference(scout.quantized.plan, scout.quantized.tensors)
    running.finish()
    assert running.digests == probe.weights


PRODUCTS = """
import torch
from quant.memory import give_back, spare_memory

spare_memory()
torch.set_num_threads(1)
weight, rows = torch.ones(64, 64).bfloat16(), torch.ones(400, 64).bfloat16()

def held():
    give_back()
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

for height in range(1, 400):
    if height == 100:
        before = held()
    torch.nn.functional.linear(rows[:height], weight)
print((held() - before) // 1024)
"""


def test_products_of_ever_other_heights_do_not_add_up():
    done = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40  # MB; it is some hundred with the libraries' own bounds


def test_a_plan_says_how_its_export_will_be_checked_and_in_what_memory(scout, monkeypatch):
    foreseen = {}
    for whole in (True, False):
        monkeypatch.setattr(estimate, "fits", lambda needed, whole=whole: whole)
        foreseen[whole] = foresee(
            scout.quantized.plan, make_method("rtn"), rows=0, row_tokens=0, counting=0, memory_bytes=0
        )
        assert foreseen[whole].whole == whole
    assert foreseen[False].gate_bytes < foreseen[True].gate_bytes


BLOCKS = """
import torch
from quant.memory import spare_memory

spare_memory()
torch.empty(30 << 20).fill_(1)  # teaches glibc's own rule to keep such blocks

def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

before, kept = held(), []
for number in range(40):
    large = torch.ones(2 << 20)
    kept.append(torch.ones(1 << 16))  # lies behind it
    del large
print((held() - before) // 1024)
"""


def test_large_tensors_go_back_though_small_ones_made_later_stay():
    done = subprocess.run([sys.executable, "-c", BLOCKS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20


def test_bounds_that_the_user_has_set_are_left_alone(monkeypatch):
    monkeypatch.setenv(memory.CACHES[0], "7")
    monkeypatch.delenv(memory.CACHES[1], raising=False)
    memory.spare_memory()
    assert [os.environ[name] for name in memory.CACHES] == ["7", "16"]


def test_memory_is_that_of_the_container_where_that_is_less(monkeypatch, tmp_path):
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(memory, "LIMITS", (str(tmp_path / "limit"), str(tmp_path / "none"), str(tmp_path / "absent")))
    assert memory.total_bytes() == 1000000
    assert memory.fits(62500) and not memory.fits(62501)
