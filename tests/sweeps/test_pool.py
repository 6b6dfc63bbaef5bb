"""Whole studies over real storages and real processes; the runs themselves are the stub's."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.trial import TrialState

import sweeps
from herd.run import config_text
from herd.run.errors import ConfigError, EnvironmentFault
from sweeps import Range, checks, spaces, storages
from sweeps.__main__ import describe, main
from sweeps.ledger import Ledger
from sweeps.trial import Slot
from sweeps.worker import Pruned, TrialsFail, Worker
from tests.sweeps import studies


def counted(study):
    found = optuna.load_study(study_name=study.name, storage=storages.open_storage(study.storage_url))
    return found, Ledger(found, study.budget.trials).ended()


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_a_study_ends_with_its_budget_the_defaults_first_and_a_report(tmp_path, storage):
    url = None if storage == "sqlite" else f"journal:{tmp_path / 'journal.log'}"
    study = studies.make(tmp_path, storage=url)
    result = sweeps.run(study)
    assert [trial.state for trial in result.trials] == ["complete"] * 5
    assert result.trials[0].defaults and result.trials[0].overrides == ("optim.lr=0.004",)
    assert result.best.values == (min(trial.values for trial in result.trials)[0],)
    assert (study.home / "report.html").stat().st_size > 10_000
    again = sweeps.run(study)  # nothing is left to do
    assert again == result
    assert len((study.home / "starts").read_text().split()) == 5


def test_two_workers_share_a_study_without_a_trial_too_many(tmp_path):
    study = studies.make(tmp_path, budget={"trials": 7}, launch={"program": studies.STUB, "workers": 2})
    result = sweeps.run(study)
    assert len(result.trials) == 7
    assert len({trial.overrides for trial in result.trials}) == 7


def test_bad_trials_are_cut_early_and_cost_fewer_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_SECONDS", "0.4")
    study = studies.make(
        tmp_path, set=["run.steps=6", "tracking.enabled=false"], budget={"trials": 6},
        pruner={"kind": "median", "startup": 1}, sampler={"kind": "random", "seed": 2},
    )  # fmt: skip
    result = sweeps.run(study)
    pruned = [trial for trial in result.trials if trial.state == "pruned"]
    assert pruned and all(trial.why.startswith("step ") for trial in pruned)
    for trial in pruned:
        assert not (trial.folder / "done").exists()
        last = json.loads((trial.folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["step"] < 6 and not psutil.pid_exists(last["pid"])
        assert trial.mlflow_run_id == f"mlflow-{trial.folder.name}"
    assert not list(study.home.glob("*/checkpoints"))  # of trials that are over, however they ended


def test_halving_ends_trials_at_its_rungs(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_SECONDS", "0.3")
    study = studies.make(
        tmp_path, set=["run.steps=6", "run.evaluate_every=1", "tracking.enabled=false"],
        budget={"trials": 6}, pruner={"kind": "halving", "factor": 2}, sampler={"kind": "random", "seed": 2},
    )  # fmt: skip
    result = sweeps.run(study)
    pruned = [trial for trial in result.trials if trial.state == "pruned"]
    assert len(pruned) >= 2 and {trial.why for trial in pruned} <= {"step 1", "step 2", "step 4"}
    assert result.best.state == "complete" and max(steps_of(study, result.best)) == 6


def test_a_trial_that_has_made_its_last_step_is_complete(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_LINGER", "1")  # to write its models
    study = studies.make(
        tmp_path, set=["run.steps=1", "run.evaluate_every=1", "teacher.head_start=0", "tracking.enabled=false"],
        budget={"trials": 4}, pruner={"kind": "halving", "factor": 2}, sampler={"kind": "random", "seed": 2},
    )  # fmt: skip
    assert [trial.state for trial in sweeps.run(study).trials] == ["complete"] * 4


def steps_of(study, trial):
    found, _ = counted(study)
    return next(t.intermediate_values for t in found.trials if t.number == trial.number)


def test_a_trial_over_its_time_is_stopped_and_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_SECONDS", "5")
    study = studies.make(tmp_path, budget={"trials": 1, "trial_minutes": 0.05})
    (trial,) = sweeps.run(study).trials
    assert trial.state == "pruned" and "trial_minutes" in trial.why


def test_a_base_that_fails_stops_the_study_after_its_first_trial(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_FAIL", "4")
    study = studies.make(tmp_path, budget={"trials": 50})
    with pytest.raises(TrialsFail, match="the stub was told to fail") as caught:
        sweeps.run(study)
    assert caught.value.exit_code == 4
    assert (study.home / "starts").read_text().split() == ["trial-0000"]


@pytest.mark.parametrize("fault", [("STUB_FAIL", "4"), ("STUB_METRIC", "heldout/other")])
def test_a_base_that_failed_is_tried_again_once_what_ails_it_is_mended(tmp_path, monkeypatch, fault):
    study = studies.make(tmp_path, budget={"trials": 2})
    monkeypatch.setenv(*fault)
    with pytest.raises(TrialsFail):
        sweeps.run(study)
    monkeypatch.delenv(fault[0])
    result = sweeps.run(study)
    assert [trial.state for trial in result.trials] == ["complete"] * 2 and result.default is not None


def test_a_study_that_has_found_nothing_begins_anew_with_other_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_FAIL", "2")
    with pytest.raises(TrialsFail):
        sweeps.run(studies.make(tmp_path, budget={"trials": 2}))
    monkeypatch.delenv("STUB_FAIL")
    study = studies.make(tmp_path, budget={"trials": 2}, set=["run.steps=3", "tracking.enabled=false"])
    assert "trial 0   the base as it is" in describe(study)
    result = sweeps.run(study)
    assert [trial.state for trial in result.trials] == ["complete"] * 2 and result.default is not None


def test_a_study_without_a_complete_trial_says_so_with_exit_code_5(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STUB_FAIL", "5")
    path = tmp_path / "study.yaml"
    study = studies.make(tmp_path, budget={"trials": 1})
    path.write_text(config_text.write(study.model_dump(mode="json", exclude_none=True)))
    assert main(["--study", str(path)]) == 5
    assert "stubbed: no trial is complete, so there is no best one" in capsys.readouterr().err


def test_trials_without_a_finite_loss_are_pruned_and_the_study_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_FAIL", "5")
    assert {trial.state for trial in sweeps.run(studies.make(tmp_path)).trials} == {"pruned"}


def test_a_program_that_writes_no_metrics_stops_the_study_with_the_file_it_was_to_write(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_FAIL", "0")
    study = studies.make(tmp_path, budget={"trials": 50})
    with pytest.raises(
        TrialsFail, match=r"trial-0000/metrics.jsonl; its program must write heldout/scout there"
    ) as caught:
        sweeps.run(study)
    assert caught.value.exit_code == 2
    assert (study.home / "starts").read_text().split() == ["trial-0000"]


def test_a_dry_run_says_how_far_a_study_is_and_refuses_another_one_of_its_name(tmp_path):
    study = studies.make(tmp_path, budget={"trials": 2})
    assert "trial 0   the base as it is" in describe(study) and not list(tmp_path.iterdir())
    sweeps.run(study)
    assert "goes on   2 of 2 trials have ended" in describe(study)
    with pytest.raises(ConfigError, match="another one"):
        describe(studies.make(tmp_path, seed=1))


def test_a_base_whose_runs_are_killed_stops_the_study_after_three_tries(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_FAIL", "137")
    study = studies.make(tmp_path, budget={"trials": 50})
    with pytest.raises(EnvironmentFault, match="killed by signal 9; out of memory"):
        sweeps.run(study)
    assert (study.home / "starts").read_text().split() == ["trial-0000"] * 3


@pytest.mark.parametrize("loss", ["nan", "1e+308"])
def test_a_run_that_ends_well_with_a_loss_that_is_none_is_pruned(tmp_path, monkeypatch, loss):
    monkeypatch.setenv("STUB_LOSS", loss)
    result = sweeps.run(studies.make(tmp_path, budget={"trials": 2}))
    assert [(trial.state, trial.why) for trial in result.trials] == [("pruned", f"heldout/scout = {loss}")] * 2


def test_a_repeat_that_fails_is_left_out_and_alone_runs_again(tmp_path, monkeypatch):
    space = {"optim.lr": Range(low=0.003, high=0.004, step=0.001)}
    study = studies.make(tmp_path, space=space, sampler={"kind": "grid"}, repeats={"seeds": 3})
    monkeypatch.setenv("STUB_FAIL", "5")
    monkeypatch.setenv("STUB_SEED", "1001")
    result = sweeps.run(study)
    assert result.repeats["pairs"] == 2 and result.repeats["values"]["best"][1] is None
    assert "over 2 fresh seeds" in (study.home / "report.html").read_text()
    monkeypatch.delenv("STUB_FAIL")
    assert sweeps.run(study).repeats["pairs"] == 3
    counts = Counter((study.home / "starts").read_text().split())
    assert {name for name, count in counts.items() if count > 1} == {
        "repeat-best-0001-seed-1001",
        "repeat-defaults-seed-1001",
    }
    assert len(counts) == 2 + 6  # a grid of two points has two trials, whatever the budget


def test_a_command_waits_for_the_trials_of_other_machines_and_takes_up_those_they_leave(tmp_path):
    study = studies.make(tmp_path, budget={"trials": 2})
    found = storages.open_study(study, checks.check(study))
    ledger, elsewhere = Ledger(found, 2), found.ask(spaces.distributions(study.space))
    assert ledger.claim(elsewhere)
    elsewhere.set_user_attr("owner", "elsewhere 1 0.00")
    later = threading.Timer(6, lambda: ledger.pause(elsewhere))
    later.start()
    result = sweeps.run(study)
    assert not later.is_alive()
    assert [trial.state for trial in result.trials] == ["complete"] * 2 and result.default is not None


def test_a_worker_that_was_taken_for_dead_leaves_its_trial_to_the_other_however_it_ended(tmp_path, monkeypatch):
    study = studies.make(tmp_path, budget={"trials": 1})
    base = checks.check(study)
    found = storages.open_study(study, base)

    def lost_meanwhile(worker, trial, *_):
        optuna.Trial(found, trial._trial_id).set_user_attr("lost", True)
        found.tell(trial.number, state=TrialState.FAIL)
        monkeypatch.setattr(Worker, "values", lambda *_: [1.0])  # the other one's
        found.enqueue_trial(trial.params)
        raise Pruned("step 3")

    monkeypatch.setattr(Worker, "values", lost_meanwhile)
    Worker(study, base, Slot(0, threads=1), found).work()
    assert [trial.value for trial in Ledger(found, 1).ended()] == [1.0]


def test_an_objective_no_run_reports_is_named_with_what_there_is(tmp_path):
    study = studies.make(tmp_path, objectives=[{"metric": "heldout/scoot"}])
    with pytest.raises(TrialsFail, match="never reported heldout/scoot; it has heldout/scout"):
        sweeps.run(study)


def test_a_larger_budget_goes_on_where_the_study_was_and_another_space_is_refused_with_the_difference(tmp_path):
    sweeps.run(studies.make(tmp_path, budget={"trials": 1}))
    other = studies.make(tmp_path, budget={"trials": 1}, space={"optim.lr": Range(low=1e-4, high=1e-2, log=True)})
    with pytest.raises(ConfigError, match=r"space: \+.*0.01"):
        sweeps.run(other)
    study = studies.make(tmp_path, budget={"trials": 3})
    assert len(sweeps.run(study).trials) == 3
    assert len((study.home / "starts").read_text().split()) == 3


def test_wilcoxon_stops_a_trial_that_loses_seed_after_seed(tmp_path):
    study = studies.make(tmp_path, seeds=6, pruner={"kind": "wilcoxon", "startup": 4}, budget={"trials": 5})
    result = sweeps.run(study)
    best = result.best
    assert any(trial.state == "pruned" and trial.why.startswith("seed ") for trial in result.trials)
    assert best.state == "complete"


def test_a_grid_runs_every_point_once_and_repeats_are_paired_with_fresh_seeds(tmp_path):
    space = {"optim.lr": Range(low=0.003, high=0.005, step=0.001)}
    study = studies.make(tmp_path, space=space, sampler={"kind": "grid"}, budget={"trials": 3}, repeats={"seeds": 2})
    result = sweeps.run(study)
    assert sorted(t.overrides for t in result.trials) == [(f"optim.lr={v}",) for v in (0.003, 0.004, 0.005)]
    assert result.best.overrides == ("optim.lr=0.003",)
    expected = result.best.values[0] - result.default.values[0]
    assert result.repeats["difference"] == pytest.approx(expected, abs=1e-9)  # the stub's seeds shift both alike
    assert result.repeats["interval"] == pytest.approx([expected, expected], abs=1e-9)


def test_killed_workers_and_commands_lose_no_trial_and_count_none_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_SECONDS", "0.1")
    study = studies.make(
        tmp_path, budget={"trials": 8}, set=["run.steps=8", "tracking.enabled=false"],
        launch={"program": studies.STUB, "workers": 2},
    )  # fmt: skip
    path = tmp_path / "study.json"
    path.write_text(study.model_dump_json())
    code = "import sys, sweeps; sweeps.run(sweeps.Study.model_validate_json(open(sys.argv[1]).read()))"
    choose = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=studies.ROOT)
        time.sleep(3 + 2 * choose.random())
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it may be done already
            family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children())]
        for pid in choose.sample(family, min(2, len(family))):
            with_kill(pid)
        if process.poll() is None:
            process.kill()
        process.wait()
    result = sweeps.run(study)
    assert len(result.trials) == 8 and {trial.state for trial in result.trials} == {"complete"}
    found, ended = counted(study)
    assert not found.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))
    folders = Counter(trial.user_attrs["folder"] for trial in ended)
    assert set(folders.values()) == {1}
    for trial in ended:  # no step of a run was made twice, by two processes at once
        steps = [json.loads(line)["step"] for line in lines_of(trial.user_attrs["folder"])]
        assert steps == list(range(1, 9))


def lines_of(folder: str) -> list[str]:
    return (Path(folder) / "metrics.jsonl").read_text().splitlines()


def with_kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def test_an_interrupted_study_goes_on_with_the_trial_it_was_at(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_SECONDS", "0.5")
    study = studies.make(tmp_path, budget={"trials": 2}, set=["run.steps=8", "tracking.enabled=false"])
    path = tmp_path / "study.json"
    path.write_text(study.model_dump_json())
    code = "import sys, sweeps; sweeps.run(sweeps.Study.model_validate_json(open(sys.argv[1]).read()))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=studies.ROOT, stderr=subprocess.PIPE, text=True
    )
    first = study.home / "trial-0000" / "metrics.jsonl"
    while not first.exists() or not first.read_text():
        time.sleep(0.1)
        assert process.poll() is None
    process.terminate()
    assert "nothing is lost" in process.communicate()[1]
    monkeypatch.setenv("STUB_SECONDS", "0")
    result = sweeps.run(study)
    assert len(result.trials) == 2
    assert Counter((study.home / "starts").read_text().split())["trial-0000"] == 2
