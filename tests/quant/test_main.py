"""`python -m quant`: plans, exports, tracks, and answers mistakes with one line and the right exit code."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from herd.run.errors import ConfigError
from herd.run.lineage import write_lineage
from herd.run.tracking import open_tracker
from quant.__main__ import main
from quant.tensor_files import TensorFiles


def command(folders: dict, tmp_path: Path, *more: str, model: str = "maverick", scheme: str = "int4") -> list[str]:
    base = ["--model", str(folders[model]), "--scheme", scheme, "--out", str(tmp_path / "out"), "--no-tracking"]
    return [*base, *more]


def test_help_and_usage_errors_come_before_torch():
    code = """
import sys
from quant.__main__ import main
for arguments in (["--help"], ["--scheme", "int3"]):
    try:
        main(arguments)
    except SystemExit as stop:
        print(stop.code)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("usage: python -m quant")
    assert done.stdout.splitlines()[-1] == "2"


def test_a_dry_run_says_what_would_happen_and_writes_nothing(folders, tmp_path, capsys):
    assert main(command(folders, tmp_path, "--group-size", "32", "--dry-run")) == 0
    text = capsys.readouterr().out
    assert "8 x 64 x 64  *.feed_forward.experts.*.gate_proj" in text.replace("     ", " ") or "experts.*" in text
    assert "4.500 per quantised weight" in text
    assert not list(tmp_path.iterdir())


def test_a_dry_run_foretells_the_export(folders, tmp_path, capsys):
    assert main(command(folders, tmp_path, "--group-size", "32", "--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(command(folders, tmp_path, "--group-size", "32", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert {key: result[key] for key in plan} == plan
    assert result["gate"]["passed"]
    assert result["gate"]["facts"]["quantised_layers"] == len(plan["quantised"])
    stored = TensorFiles(tmp_path / "out")
    assert sum(tensor.nbytes for tensor in stored.values()) == plan["bytes_after"]
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert (lineage["role"], lineage["student"], lineage["scheme"]) == ("export", "maverick", "int4-g32")


def test_a_gguf_file_is_made_and_described(folders, tmp_path, capsys):
    more = ["--group-size", "32", "--container", "gguf", "--reader", "llama.cpp"]
    assert main([*command(folders, tmp_path), *more]) == 0
    shown = capsys.readouterr().out
    assert "int4-g32 (Q4_0)" in shown and "ok   metadata" in shown
    assert (tmp_path / "out" / "model.gguf").is_file()
    assert "--container gguf" in json.loads((tmp_path / "out" / "lineage.json").read_text())["command"]


@pytest.mark.parametrize(
    "more, code, line",
    [
        (["--group-size", "48"], 2, "group_size = 48"),
        (["--group-size", "128"], 2, "group_size 128; use group_size 32 or 64"),
        (["--ignore", "nothing"], 2, "matches no linear layer"),
        (["--group-size", "0"], 2, "group_size = 0"),
        (["--group-size", "1e3"], 2, "group_size = 1e3 is not allowed; use one of 32, 64, 128, channel"),
        (["--group-size", "32", "--out", "."], 2, "out = '.': names no folder that can be made"),
        (["--group-size", "32", "--scheme", "fp8"], 2, "fp8 has no choice of groups"),
        (
            ["--group-size", "32", "--container", "bitsandbytes"],
            2,
            "int4 cannot be stored as bitsandbytes; it goes into",
        ),
        (["--group-size", "32", "--scheme", "int4-asym", "--reader", "vllm"], 2, "expert kernels take symmetric"),
        (["--ignore", "re:["], 2, "not a regular expression"),
        (["--model", "missing"], 2, "--model missing: no such folder"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(folders, tmp_path, capsys, more, code, line):
    assert main([*command(folders, tmp_path), *more]) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert line in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_refused_before_any_work(folders, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert main(command(folders, tmp_path)) == 2
    assert "exists; remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "place, code, line",
    [
        ("..", 2, "names no folder that can be made"),
        ("new/..", 2, "names no folder that can be made; give it a name of its own"),
        ("file/out", 2, "out: {0}/file is a file, not a folder; set another out"),
        ("file/deep/out", 2, "out: {0}/file is a file, not a folder; set another out"),
        ("dangling", 2, "out = {0}/dangling: a link to nowhere, which does not exist; remove the link"),
        ("x" * 300, 2, "its name has more than 243 bytes; choose a shorter one"),
        ("x" * 300 + "/out", 3, "cannot be made (File name too long); set another out"),
    ],
)
def test_a_place_where_no_folder_can_be_is_one_line(folders, tmp_path, capsys, place, code, line):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    words = command(folders, tmp_path, "--group-size", "32")
    words[words.index("--out") + 1] = str(tmp_path / place)
    assert main(words) == code
    (error,) = capsys.readouterr().err.splitlines()
    assert line.format(tmp_path) in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


@pytest.mark.parametrize(
    "content, line",
    [
        (b'{"*": "fp8", "*": "bf16"}', "'*' stands there twice; keep one of them"),
        (b'\xef\xbb\xbf{"*": "fp7"}', "'fp7' is no choice; the nearest is fp8"),  # a byte order mark is no mistake
    ],
)
def test_mistakes_in_an_allocations_file_are_one_line(folders, tmp_path, capsys, content, line):
    (tmp_path / "bits.json").write_bytes(content)
    words = [
        "--model",
        str(folders["llama"]),
        "--allocation",
        str(tmp_path / "bits.json"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error


def test_a_full_disk_names_the_folder_and_the_flag_that_moves_it(folders, tmp_path, capsys, monkeypatch):
    def no_room(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quant.exports.write_shards", no_room)
    assert main(command(folders, tmp_path, "--group-size", "32")) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot write {tmp_path / 'out'}: the disk is full (")
    assert line.endswith(f" free at {tmp_path}); free some space there, or name an --out on another disk")
    assert not list(tmp_path.iterdir())


def test_an_export_that_will_not_fit_is_refused_with_the_bytes_it_needs(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("herd.run.files.shutil.disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert main(command(folders, tmp_path, "--group-size", "32")) == 3
    line = capsys.readouterr().err.strip()
    mend = "free some, or name an --out on another disk"
    assert re.fullmatch(rf"error: the export out needs [\d.]+ MB, 1\.0 kB free at {tmp_path}; {mend}", line)


def test_the_command_is_an_mlflow_run_with_the_model_and_its_lineage(folders, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    herd = open_tracker(tmp_path / "herd", experiment="presses", run_name="herd", uri=uri)
    student = herd.nested("maverick", "student")
    student.model("maverick", folders["maverick"], role="student", alias=None)
    herd.finish()
    write_lineage(folders["maverick"], name="maverick", run_id=student.run_id)
    arguments = [a for a in command(folders, tmp_path, "--experiment", "presses", scheme="fp8") if a != "--no-tracking"]
    try:
        assert main(arguments) == 0
    finally:
        (folders["maverick"] / "lineage.json").unlink()
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("presses")
    (run,) = client.search_runs([experiment.experiment_id], "tags.herd.role = 'export'")
    assert run.data.tags["mlflow.parentRunId"] == student.run_id
    (made,) = client.get_run(student.run_id).outputs.model_outputs
    assert [model.model_id for model in client.get_run(run.info.run_id).inputs.model_inputs] == [made.model_id]
    assert run.data.params["scheme"] == "fp8"
    assert run.data.metrics["export/bytes_after"] == sum(t.nbytes for t in TensorFiles(tmp_path / "out").values())
    version = client.get_model_version_by_alias("out", "fp8")
    assert version.tags["student"] == "maverick"


@pytest.fixture(scope="module")
def readable(folders, tmp_path_factory) -> Path:
    """A tiny model with a tokenizer of 128 pieces, and text."""
    folder = tmp_path_factory.mktemp("readable") / "scout"
    shutil.copytree(folders["scout"], folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(128)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2").save_pretrained(folder)
    generator = random.Random(0)
    lines = (" ".join(f"w{generator.randrange(128)}" for _ in range(200)) for _ in range(60))
    (folder.parent / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def calibrated(readable: Path, tmp_path: Path, *more: str) -> list[str]:
    text = str(readable.parent / "text.jsonl")
    given = ["--method", "gptq", "--group-size", "32", "--calibration", text, "--row-tokens", "64"]
    return [*command({"maverick": readable}, tmp_path), *given, "--calibration-rows", "24", "--most-rows", "48", *more]


def test_a_calibrated_export_says_beforehand_what_it_takes_and_afterwards_what_it_saw(readable, tmp_path, capsys):
    assert main(calibrated(readable, tmp_path, "--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["method"], plan["calibration_rows"], plan["row_tokens"]) == ("gptq", 24, 64)
    assert plan["estimated_peak_bytes"] > 10**8
    assert not list(tmp_path.iterdir())
    assert main(calibrated(readable, tmp_path, "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["gate"]["passed"]
    coverage = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert 24 <= coverage["summary"]["rows"] <= 48
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert "--method gptq" in lineage["command"] and "--calibration-rows 24" in lineage["command"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "more, code, line",
    [
        (
            ["--method", "rtn"],
            2,
            "--calibration: method rtn reads no calibration rows; use --method gptq or gptq-gated",
        ),
        (["--calibration-rows", "0"], 2, "--calibration-rows 0: give more than zero"),
        (
            ["--row-tokens", "100000"],
            4,
            "needs 100001; give more text or lower --row-tokens, or give another --calibration",
        ),
        (["--row-tokens", "1"], 2, "--row-tokens 1: give 8 or more"),
        (
            ["--row-tokens", "8"],
            4,
            "[48, 8] tokens, at least 1024 in rows of one length are needed; give more text, or ",
        ),
        (["--most-rows", "8"], 2, "--most-rows 8: --calibration-rows 24 are drawn in any case; give 24 or more"),
        (
            ["--row-tokens", "264"],
            2,
            "calibration rows of 264 tokens: the model has 256 positions; give --row-tokens 256",
        ),
        (["--calibration", ""], 2, "--calibration is empty; name a file"),
        (["--calibration", "nowhere.jsonl"], 2, "error: --calibration nowhere.jsonl: no such file or folder"),
    ],
)
def test_mistakes_in_calibration_are_one_line(readable, tmp_path, capsys, more, code, line):
    assert main(calibrated(readable, tmp_path, *more)) == code
    (complaint,) = capsys.readouterr().err.splitlines()
    assert line in complaint


def test_an_export_inside_its_own_model_is_refused(folders, tmp_path, capsys):
    words = command(folders, tmp_path, "--group-size", "32")
    words[words.index("--out") + 1] = str(folders["maverick"] / "out")
    assert main(words) == 2
    assert "lies in the --model folder; choose a place outside it" in capsys.readouterr().err


def test_a_calibration_that_cannot_be_followed_leaves_nothing(readable, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise ConfigError("it changes what passes between its layers")

    monkeypatch.setattr("quant.calibration.walk.Walk.advance", refuse)
    assert main(calibrated(readable, tmp_path)) == 2
    assert "it changes what passes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_tells_that_finished_layers_are_kept(readable, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr("quant.exports.probe_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(calibrated(readable, tmp_path)) == 75
    assert "stopped; finished layers are kept, and the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(calibrated(readable, tmp_path)) == 0
    assert "going on from them" in caplog.text


def test_a_model_that_does_not_say_what_it_read_needs_a_source(folders, tmp_path, capsys):
    assert main(command(folders, tmp_path, "--group-size", "32", "--method", "gptq")) == 2
    assert "does not say what it was trained on; give --calibration SOURCE" in capsys.readouterr().err
