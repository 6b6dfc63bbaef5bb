"""A study that goes on after something changed around it: its budget, its base, its program, its workers."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

import sweeps
from herd.run.errors import ConfigError
from sweeps import Range, checks, metrics, storages
from sweeps.trial import Slot, TrialRun
from sweeps.worker import STOPPED, TrialsFail, Worker
from tests.sweeps import studies

QUICK = ["run.steps=4", "tracking.enabled=false"]


def changed_base(folder: Path, rate: float) -> Path:
    """The smoke configuration with another learning rate."""
    tree = yaml.safe_load((studies.ROOT / "configs" / "smoke.yaml").read_text())
    tree["optim"]["lr"] = rate
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_grid_has_every_point_once_when_the_bases_own_is_written_with_a_point(tmp_path):
    space = {"loss.temperature": Range(low=1, high=4, step=1)}  # the base has 1.0
    result = sweeps.run(studies.make(tmp_path, space=space, sampler={"kind": "grid"}))
    assert sorted(trial.overrides for trial in result.trials) == [(f"loss.temperature={n}",) for n in (1, 2, 3, 4)]
    assert result.default.overrides == ("loss.temperature=1",)


def test_values_that_are_wrong_together_are_a_failed_trial_and_the_study_goes_on(tmp_path):
    space = {"optim.warmup": Range(low=0.0, high=0.65), "optim.decay": Range(low=0.05, high=0.85)}
    result = sweeps.run(studies.make(tmp_path, space=space, sampler={"kind": "random"}, budget={"trials": 8}))
    states = [trial.state for trial in result.trials]
    assert len(states) == 8 and {"complete", "failed"} == set(states)
    assert all("optim.warmup + optim.decay" in trial.why for trial in result.trials if trial.state == "failed")


def test_repeats_of_a_trial_that_is_no_longer_the_best_are_not_shown_as_the_bests(tmp_path):
    changes = {"sampler": {"kind": "random", "seed": 3}, "set": [*QUICK, "optim.lr=0.05"]}
    first = sweeps.run(studies.make(tmp_path, budget={"trials": 2}, repeats={"seeds": 2}, **changes))
    assert first.repeats["trial"] == first.best.number
    more = studies.make(tmp_path, budget={"trials": 12}, **changes)
    result = sweeps.run(more)
    assert result.best.number != first.best.number
    assert result.repeats is None and "fresh seeds" not in result.table()
    last = sweeps.run(studies.make(tmp_path, budget={"trials": 12}, repeats={"seeds": 2}, **changes))
    assert last.repeats["trial"] == last.best.number
    starts = (more.home / "starts").read_text().split()
    assert len([name for name in starts if name.startswith("repeat-defaults")]) == 2  # serve both


def test_repeats_of_defaults_that_are_the_best_are_told(tmp_path):
    space = {"optim.lr": Range(low=0.004, high=0.1, log=True)}  # the base's own is the best of them
    result = sweeps.run(studies.make(tmp_path, space=space, budget={"trials": 3}, repeats={"seeds": 2}))
    assert result.best.defaults and "the defaults are the best; 2 fresh seeds give" in result.table()


def test_runs_of_another_base_are_set_aside_when_the_storage_is_a_new_one(tmp_path):
    space = {"loss.temperature": Range(low=0.5, high=2.0)}  # the stub's loss is of the base's rate
    first = studies.make(tmp_path, base=changed_base(tmp_path, 0.01), space=space)
    before = sweeps.run(first)
    changed_base(tmp_path, 0.02)
    result = sweeps.run(first.model_copy(update={"storage": f"journal:{tmp_path / 'new.log'}"}))
    assert {trial.values for trial in before.trials} != {trial.values for trial in result.trials}
    assert len({trial.values for trial in result.trials}) == 1
    assert len(list(first.home.glob("aside-*/trial-*"))) == 5


def test_another_program_makes_another_study(tmp_path):
    sweeps.run(studies.make(tmp_path, budget={"trials": 1}))
    other = studies.make(tmp_path, launch={"program": [sys.executable, "-m", "tests.sweeps.stub", "--other"]})
    with pytest.raises(ConfigError, match="is another one"):
        sweeps.run(other)


def test_steps_of_a_training_count_from_where_its_students_start(tmp_path):
    study = studies.make(tmp_path, set=["teacher.head_start=3"], launch={})
    base = checks.check(study)
    run = TrialRun.of(study, name="trial-0000", overrides=[], seed=0)
    run.folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "heldout/scout": float(step)}) for step in range(1, 6)]
    (run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    stream = Worker(study, base, Slot(0, 1), None).stream(run, base)
    assert list(stream.new("heldout/scout")) == [(1, 4.0), (2, 5.0)]


def test_pruners_see_a_programs_own_steps_whatever_the_bases_head_start(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_SECONDS", "0.3")
    study = studies.make(
        tmp_path, set=["run.steps=4", "teacher.head_start=4", "tracking.enabled=false"], budget={"trials": 5},
        pruner={"kind": "median", "startup": 1}, sampler={"kind": "random", "seed": 2},
    )  # fmt: skip
    assert "pruned" in {trial.state for trial in sweeps.run(study).trials}


def test_a_worker_that_is_told_to_stop_alone_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_SECONDS", "1")
    study = studies.make(tmp_path, set=["run.steps=4", "tracking.enabled=false"], budget={"trials": 2})

    def send_away() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and not (study.home / "starts").exists():
            time.sleep(0.1)
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "spawn_main" in " ".join(child.cmdline()):
                    os.kill(child.pid, signal.SIGTERM)

    thread = threading.Thread(target=send_away)
    thread.start()
    result = sweeps.run(study)
    thread.join()
    assert [trial.state for trial in result.trials] == ["complete"] * 2
    assert (study.home / "starts").read_text().split().count("trial-0000") == 2


def test_every_worker_is_told_why_the_study_stopped(tmp_path):
    study = studies.make(tmp_path)
    base = checks.check(study)
    found = storages.open_study(study, base)
    found.set_user_attr(STOPPED, ["trial 0: no disk", 4])
    with pytest.raises(TrialsFail, match="stubbed stops: trial 0: no disk") as caught:
        Worker(study, base, Slot(0, 1), found).work()
    assert caught.value.exit_code == 4


def test_a_repeat_that_hangs_is_left_out(tmp_path, monkeypatch):
    study = studies.make(tmp_path, budget={"trials": 1, "trial_minutes": 0.05}, repeats={"seeds": 2})
    sweeps.run(study.model_copy(update={"repeats": study.repeats.model_copy(update={"seeds": 0})}))
    monkeypatch.setenv("STUB_LINGER", "60")
    result = sweeps.run(study)
    assert result.repeats["values"]["best"] == [None, None]


def test_a_blank_line_in_a_programs_metrics_is_no_fault(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n" + json.dumps({"step": 1, "loss": 2.0}) + "\n\n")
    assert list(metrics.MetricsStream(path).new("loss")) == [(1, 2.0)]
    assert metrics.final(tmp_path, "loss") == 2.0
