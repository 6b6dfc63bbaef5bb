"""The words of the summary follow from the numbers: gains, costs, what stopped and what is not known."""

import json
from pathlib import Path

import pytest

from herd.report.record import read_run
from herd.report.summary import summarise
from tests.report.fabrication import entries, fabricate_run


def words(folder: Path) -> str:
    return " ".join(summarise(read_run(folder)))


def test_a_whole_run_is_told_in_numbers(tmp_path: Path) -> None:
    text = words(fabricate_run(tmp_path / "nano"))
    assert (
        "trained scout and maverick together with their teacher (behemoth-nano) for 400 steps of 2,048 tokens" in text
    )
    assert "(819 k in all) in 9 min 08 s on 2 ranks." in text
    assert "the teacher reaches 4.331 nats per token, scout 4.607 (+0.276) and maverick 4.684 (+0.353)." in text
    assert (
        "Trained alone on the same batches, scout reached 4.733: distilling gained 0.126 nats, 31 % of the gap" in text
    )
    assert "scout int4 is 2.4 times smaller (4.02 MB) at +0.012 nats" in text
    assert "Not known" not in text


def test_a_student_worse_than_its_control_is_said_to_have_lost(tmp_path: Path) -> None:
    folder = fabricate_run(tmp_path / "nano", steps=5)
    changed = [e | {"heldout_nats": 4.5} if e["role"] == "control" else e for e in entries()]
    (folder / "evals.json").write_text(json.dumps({"entries": changed}))
    assert "distilling cost 0.107 nats." in words(folder)


def test_a_stopped_run_says_where_and_falls_back_on_training_losses(tmp_path: Path) -> None:
    folder = fabricate_run(tmp_path / "nano", steps=400, logged_until=120)
    (folder / "evals.json").unlink()
    text = words(folder)
    assert "for 120 steps" in text and "400 were planned, so it was interrupted or is still running" in text
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[99])
    assert f"At the last held-out check (step 100) the teacher reaches {last['heldout/teacher']:.3f} nats" in text
    assert "Not known from this run folder: final evaluations." in text
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        config.replace("steps: 400", "steps: 100").replace("mode: codistill", "mode: codistill\n  head_start: 60")
    )
    assert "160 were planned, so it was interrupted" in words(folder)


def test_missing_controls_are_admitted(tmp_path: Path) -> None:
    folder = fabricate_run(tmp_path / "nano", steps=5)
    (folder / "evals.json").write_text(json.dumps({"entries": [e for e in entries() if e["role"] != "control"]}))
    assert "Not known from this run folder: the gain over training alone (no control was evaluated)." in words(folder)


@pytest.mark.parametrize("key", ["teacher/ce", "student/scout/ce"])
def test_a_loss_that_broke_is_named_with_its_step(tmp_path: Path, key: str) -> None:
    folder = fabricate_run(tmp_path / "nano", steps=5)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[3][key] = float("nan")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = "teacher" if key.startswith("teacher") else "scout"
    assert f"The loss of {model} was not finite at step 4." in words(folder)
