"""run.json: every command, and when the run started, trained and finished, through resumes and second starts."""

import json
from pathlib import Path

import pytest

from distill import run_record


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a minute later than the one before."""
    minutes = iter(range(60))
    monkeypatch.setattr(run_record, "_now", lambda: f"12:{next(minutes):02d}")


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def moments(folder: Path) -> dict[str, str]:
    return {name: record(folder)[name] for name in ("started", "trained", "finished") if name in record(folder)}


def test_the_end_of_training_and_the_end_of_the_run_are_two_moments(tmp_path: Path, clock: None) -> None:
    run_record.begin(tmp_path, "one")
    assert moments(tmp_path) == {"started": "12:00"}
    run_record.mark(tmp_path, "trained")
    run_record.mark(tmp_path, "finished")
    assert moments(tmp_path) == {"started": "12:00", "trained": "12:01", "finished": "12:02"}
    assert record(tmp_path)["commands"] == ["one"]


def test_a_run_that_goes_on_is_not_finished_and_is_not_trained_twice(tmp_path: Path, clock: None) -> None:
    run_record.begin(tmp_path, "one")
    run_record.mark(tmp_path, "trained")
    run_record.mark(tmp_path, "finished")
    run_record.begin(tmp_path, "two")
    assert set(moments(tmp_path)) == {"started", "trained"}
    run_record.mark(tmp_path, "trained", again=False)
    run_record.mark(tmp_path, "finished")
    found = moments(tmp_path)
    assert (found["started"], found["trained"]) == ("12:00", "12:01") and found["finished"] > "12:02"
    assert record(tmp_path)["commands"] == ["one", "two"]


def test_a_run_interrupted_before_its_last_step_is_trained_when_it_gets_there(tmp_path: Path, clock: None) -> None:
    run_record.begin(tmp_path, "one")
    run_record.begin(tmp_path, "two")
    run_record.mark(tmp_path, "trained", again=False)
    assert set(moments(tmp_path)) == {"started", "trained"}


def test_code_and_versions_are_noted(tmp_path: Path) -> None:
    run_record.begin(tmp_path, "one")
    assert record(tmp_path)["world_size"] == 1
    assert {"python", "torch", "deepspeed"} <= record(tmp_path)["versions"].keys()
