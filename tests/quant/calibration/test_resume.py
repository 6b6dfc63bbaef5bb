"""Killed at any moment and started again, a calibrated export ends with the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quant
from herd.run.files import sha256
from quant.calibration.rows import CalibrationRows
from quant.calibration.settings import Calibration
from quant.quantized import QuantizedModel
from quant.target import finished_layers

SCRIPT = """
import sys, torch
from pathlib import Path
from tests.quant.calibration.test_resume import quantise
torch.set_num_threads(1)
for name, tensor in quantise(Path(sys.argv[1]), Path(sys.argv[2])).tensors.items():
    pass
"""


def quantise(folder: Path, out: Path, *, method: str = "gptq") -> QuantizedModel:
    tokens_NT = torch.randint(0, 128, (160, 64), generator=torch.Generator().manual_seed(1))
    calibration = Calibration(CalibrationRows(tokens_NT), first=64, work=finished_layers(out))
    return quant.quantize(folder, scheme="int4", group_size=32, method=method, calibration=calibration)


def digests(folder: Path) -> dict[str, str]:
    """Of every file but lineage.json, which holds the time."""
    return {path.name: sha256(path) for path in folder.iterdir() if path.name != "lineage.json"}


def kill_when(folder: Path, out: Path, marker: str) -> None:
    """Start quantising in a process of its own; SIGKILL it as soon as a file is there."""
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(out)], env=environment)
    while not (finished_layers(out) / marker).exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_twice_an_export_has_the_bytes_of_one_that_was_not(folders, gate, tmp_path):
    torch.set_num_threads(1)
    whole, killed = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    quant.export(quantise(folders["maverick"], whole), whole, gate=gate)
    kill_when(folders["maverick"], killed, "layer-00000.json")
    kill_when(folders["maverick"], killed, "layer-00002.safetensors")  # its marker may be missing still
    first = finished_layers(killed) / "layer-00000.safetensors"
    before = first.stat().st_mtime_ns
    quantized = quantise(folders["maverick"], killed)
    assert quantized.tensors["model.layers.3.feed_forward.router.weight"] is not None
    assert first.stat().st_mtime_ns == before  # finished layers are used, not made again
    quant.export(quantized, killed, gate=gate)
    assert digests(killed) == digests(whole)
    assert [path.name for path in killed.parent.iterdir()] == ["out"]


def test_stopped_before_any_of_its_renames_it_goes_on_to_the_same_tensors(folders, tmp_path, monkeypatch):
    whole = dict(quantise(folders["llama"], tmp_path / "whole").tensors.items())
    replace = os.replace
    stops = 0
    for stop in range(100):
        out = tmp_path / f"stop-{stop}"
        calls = 0

        def failing(source, target, stop=stop):
            nonlocal calls
            calls += 1
            if calls == stop + 1:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        try:
            dict(quantise(folders["llama"], out).tensors.items())
            break
        except KeyboardInterrupt:
            stops += 1
        monkeypatch.setattr(os, "replace", replace)
        resumed = dict(quantise(folders["llama"], out).tensors.items())
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert stops >= 8  # fingerprint; hidden states of two streams, tensors and marker of both layers


@pytest.mark.parametrize("change", ["method", "threads", "source"])
def test_work_done_for_another_command_is_not_used(folders, tmp_path, change: str):
    out = tmp_path / "out"
    folder = folders["llama"]
    assert len(quantise(folder, out).tensors["model.layers.0.mlp.up_proj.weight_scale"])
    fingerprint = finished_layers(out) / "fingerprint.json"
    before = json.loads(fingerprint.read_text())
    threads = torch.get_num_threads()
    if change == "threads":
        torch.set_num_threads(threads + 1)
    if change == "source":
        folder = shutil.copytree(folder, tmp_path / "changed")
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantized = quantise(folder, out, method="signround" if change == "method" else "gptq")
    assert len(quantized.tensors["model.layers.0.mlp.up_proj.weight_scale"])
    torch.set_num_threads(threads)
    assert json.loads(fingerprint.read_text())[change] != before[change]
    assert not (finished_layers(out) / "layer-00001.json").exists()


def test_a_source_that_was_moved_or_written_again_unchanged_is_the_same(folders, tmp_path):
    """A run that is resumed saves its student again: layers it had finished are still of that student."""
    out = tmp_path / "out"
    wanted = quantise(folders["llama"], out).tensors["model.layers.0.mlp.up_proj.weight_packed"]
    marker = finished_layers(out) / "layer-00000.json"
    before = marker.stat().st_mtime_ns
    again = shutil.copytree(folders["llama"], tmp_path / "again", copy_function=shutil.copyfile)
    assert torch.equal(quantise(again, out).tensors["model.layers.0.mlp.up_proj.weight_packed"], wanted)
    assert marker.stat().st_mtime_ns == before
