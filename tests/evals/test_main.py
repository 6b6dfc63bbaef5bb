"""The command: refusals in one line with the right exit code, and JSON alone on stdout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evals.__main__ import main
from herd.run.lineage import write_lineage
from tests.evals.tiny import save_tiny


def write_texts(folder: Path) -> None:
    folder.mkdir()
    for n in range(40):
        (folder / f"{n}.txt").write_text(f"The llama number {n} ate {n * 7} leaves and slept. " * 8)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--model", "nowhere"], 2, "--model nowhere: no such folder"),
        (["--model", ".", "--rows", "0"], 2, "--rows = 0: must be at least 1"),
        (["--model", ".", "--against", "nowhere"], 2, "--against nowhere: no such folder"),
        (["--model", "."], 4, "no config.json"),
        (["--model", ".", "--device", "potato"], 2, "--device potato: no such kind of device"),
        (["--model", ".", "--device", "hpu"], 3, "--device hpu: not usable on this machine"),
        (["--model", ".", "--out", "no/where.json"], 2, "--out no/where.json: no is no folder"),
        (["--model", ".", "--out", "binary.json"], 4, "binary.json: not a list of evaluations"),
        (["--model", "{tiny}", "--against", "."], 4, "no config.json"),
        (["--model", "{tiny}", "--data", "./no/texts"], 4, "./no/texts: no such file or folder"),
    ],
)
def test_a_mistake_is_one_line_and_a_code_in_a_dry_run_too(
    options: list[str], code: int, words: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\x87\x00")
    if "{tiny}" in options:
        options = [str(save_tiny(tmp_path / "tiny", 0)) if word == "{tiny}" else word for word in options]
        capsys.readouterr()
    for more in ([], ["--dry-run"]):
        assert main([*options, *more]) == code
        out, err = capsys.readouterr()
        assert out == "" and words in err and len(err.splitlines()) == 1


def test_the_plan_follows_an_export_to_the_data_of_its_student(tmp_path: Path, capsys) -> None:
    student, export, texts = save_tiny(tmp_path / "scout", 0), save_tiny(tmp_path / "scout-int4", 0), tmp_path / "texts"
    write_texts(texts)
    write_lineage(student, name="scout", data_config={"source": str(texts), "sequence_length": 96})
    write_lineage(export, name="scout-int4", source=str(student))
    assert main(["--model", str(export), "--rows", "3", "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["data"]["source"], plan["data"]["sequence_length"], plan["tokens"]) == (str(texts), 96, 3 * 96)


@pytest.mark.parametrize("source, fault", [("gone", "gone, which is not there"), (".", "names itself as its source")])
def test_lineage_that_leads_nowhere_is_refused_unless_data_is_named(
    source: str, fault: str, tmp_path: Path, capsys
) -> None:
    save_tiny(tmp_path, 0)
    write_lineage(tmp_path, name="scout-int4", source=str(tmp_path / source))
    capsys.readouterr()
    words = ["--model", str(tmp_path), "--rows", "10", "--dry-run"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert fault in err and "name some with --data" in err and len(err.splitlines()) == 1
    assert main([*words, "--data", "stdlib"]) == 0


def test_json_is_all_of_stdout_and_the_entry_is_kept_and_tracked(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "scout", 0)
    text = tmp_path / "texts"
    write_texts(text)
    command = [sys.executable, "-m", "evals", "--model", str(folder), "--against", str(folder), "--data", str(text)]
    command += [
        "--sequence-length",
        "32",
        "--rows",
        "5",
        "--decode-tokens",
        "2",
        "--json",
        "--control",
        "--out",
        "evals.json",
    ]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    entry = json.loads(done.stdout)
    assert (entry["rows"], entry["kl_mean"], entry["top1_agreement"], entry["role"]) == (5, 0, 1, "control")
    assert json.loads((tmp_path / "evals.json").read_text())["entries"] == [entry]
    (kept,) = (tmp_path / "runs" / "evaluations").iterdir()
    assert json.loads((kept / "evals.json").read_text())["entries"] == [entry]
    assert json.loads((kept / "mlflow.json").read_text())["runs"]["main"]
