"""Programs of a user's own that misbehave: each is one line, and the study goes on once they are mended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import sweeps
from herd.run.errors import ConfigError
from sweeps import Objective, Range, guard
from sweeps.__main__ import main
from sweeps.settings import Study
from sweeps.worker import TrialsFail
from tests.sweeps import studies

PRELUDE = """
import json, os, sys, time
from pathlib import Path
words = sys.argv[1:]
sets = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--set")
folder = Path(sets["run.folder"]) / sets["run.name"]
folder.mkdir(parents=True, exist_ok=True)
rate, seed = float(sets.get("optim.lr", 0.004)), int(sets["run.seed"])
def report(**record):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "heldout/scout": rate} | record) + "\\n")
"""
WELL = "report()"


def write(folder: Path, body: str) -> None:
    (folder / "program.py").write_text(PRELUDE + body)


def study_of(folder: Path, body: str, **changes) -> Study:
    write(folder, body)
    program = {"program": [sys.executable, str(folder / "program.py")]}
    return studies.make(folder, **({"launch": program, "budget": {"trials": 3}} | changes))


def test_a_last_line_that_fills_a_pipe_is_cut_and_stops_the_study(tmp_path):
    study = study_of(tmp_path, "print('y' * 300_000); sys.exit(9)")
    with pytest.raises(TrialsFail) as raised:
        sweeps.run(study)
    assert raised.value.exit_code == 9
    assert "yyy ... (its log: " in str(raised.value) and len(str(raised.value)) < 1000


@pytest.mark.parametrize("code", [128, 200, 255])
def test_an_exit_code_that_is_no_signals_is_the_trials_own_failure(tmp_path, code):
    result = sweeps.run(study_of(tmp_path, f"report() if rate == 0.004 else sys.exit({code})"))
    assert [trial.state for trial in result.trials] == ["complete", "failed", "failed"]
    assert result.trials[1].why == f"exit code {code}, and it said nothing"


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (
            "(folder / 'metrics.jsonl').write_text('[1, 2]\\n')",
            r'a line is no JSON object with a whole "step": \[1, 2\]',
        ),
        ("(folder / 'metrics.jsonl').write_text('[' * 100_000 + '\\n')", r'no JSON object with a whole "step": \[\[\['),
        ("folder.rmdir()", "a run ended without .*metrics.jsonl; its program must write heldout/scout there"),
        ("report(step=10**23)", 'no JSON object with a whole "step"'),
        ("report(); (folder / 'mlflow.json').write_text('garbage')", r'mlflow.json: is not {"runs": {"main": ID}}'),
        ("report(); (folder / 'mlflow.json').write_text('[]')", r'mlflow.json: is not {"runs": {"main": ID}}'),
    ],
)
def test_a_file_no_run_should_write_sets_the_run_aside_and_the_mended_program_goes_on(tmp_path, body, fault):
    study = study_of(tmp_path, body)
    with pytest.raises(TrialsFail, match=fault + ".*; the run is kept in .*aside-1"):
        sweeps.run(study)
    write(tmp_path, WELL)
    assert [trial.state for trial in sweeps.run(study).trials] == ["complete"] * 3


def test_a_number_no_float_holds_is_no_loss(tmp_path):
    result = sweeps.run(study_of(tmp_path, "report(**{'heldout/scout': 10**400 if rate != 0.004 else 1.0})"))
    assert [trial.why for trial in result.trials] == ["", *["heldout/scout = inf"] * 2]


def test_a_repeat_that_reports_nothing_is_left_out_and_runs_again(tmp_path, capfd):
    well = "report(**{'heldout/scout': -rate})"  # the defaults are not the best
    body = f"{well} if seed != 1001 else (folder / 'metrics.jsonl').touch()"
    study = study_of(tmp_path, body, repeats={"seeds": 3})
    assert sweeps.run(study).repeats["pairs"] == 2
    assert "seed-1001 is left out: objectives: " in capfd.readouterr().out
    write(tmp_path, well)
    assert sweeps.run(study).repeats["pairs"] == 3


def test_a_stopped_trial_is_said_to_be_pruned_whatever_it_had_reported(tmp_path, capfd):
    budget = {"trials": 1, "trial_minutes": 0.03}
    sweeps.run(study_of(tmp_path, "report(); time.sleep(60)", budget=budget))
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("trial 0 (1/1)")]
    assert "pruned: budget.trial_minutes = 0.03 are over" in line


def test_hours_that_are_over_are_told_and_are_no_failure(tmp_path, capfd):
    study = study_of(tmp_path, WELL, budget={"trials": 4, "hours": 1e-9})
    path = tmp_path / "study.json"
    path.write_text(study.model_dump_json())
    assert main(["--study", str(path)]) == 0
    assert "budget.hours = 1e-09 are over: 0 of 4 trials have ended" in capfd.readouterr().out


def test_of_a_front_the_best_in_the_first_objective_is_the_best(tmp_path):
    body = "report(**{'a': rate, 'b': -rate})"  # all of them are on the front
    changes = {"objectives": [Objective(metric="a"), Objective(metric="b")], "repeats": {"seeds": 2}}
    result = sweeps.run(study_of(tmp_path, body, budget={"trials": 6}, sampler={"kind": "random"}, **changes))
    assert len(result.front) == 6
    assert result.best.values[0] == min(trial.values[0] for trial in result.trials)
    assert result.repeats["trial"] == result.best.number


def test_the_log_of_the_seed_that_failed_is_named(tmp_path):
    study = study_of(tmp_path, "report() if seed == 0 else sys.exit(7)", seeds=3)
    with pytest.raises(TrialsFail, match=r"its log: .*trial-0000-seed-1\.log"):
        sweeps.run(study)


def test_a_run_whose_guard_was_killed_is_ended_before_it_is_begun_again(tmp_path):
    command = [sys.executable, guard.__file__, str(tmp_path / "lock")]
    sleeper = [sys.executable, "-c", "import os, time; os.fork(); print(os.getpid(), flush=True); time.sleep(600)"]
    first = subprocess.Popen([*command, *sleeper], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    left = [psutil.Process(int(first.stdout.readline())) for _ in range(2)]
    first.kill()
    first.wait()
    assert all(process.is_running() for process in left)
    second = subprocess.Popen([*command, sys.executable, "-c", ""], stdin=subprocess.PIPE)
    assert second.wait(60) == 0
    assert not [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    # What a mark of another start of the machine names is not ours to end.
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    (tmp_path / "lock").write_text(f"another-boot {bystander.pid} {guard.mark_of(bystander.pid).split()[2]}")
    third = subprocess.Popen([*command, sys.executable, "-c", ""], stdin=subprocess.PIPE)
    assert third.wait(60) == 0 and bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_ctrl_c_while_workers_start_is_one_line(tmp_path):
    study = study_of(tmp_path, "time.sleep(60)", space={"optim.lr": Range(low=1e-3, high=1e-2)})
    path = tmp_path / "study.json"
    path.write_text(json.dumps(study.model_dump(mode="json")))
    command = [sys.executable, "-m", "sweeps", "--study", str(path)]
    running = subprocess.Popen(
        command, cwd=studies.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 60
    while not [child for child in psutil.Process(running.pid).children() if "spawn_main" in " ".join(child.cmdline())]:
        assert time.monotonic() < until and running.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # it imports
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 75
    assert errors.splitlines() == [errors.strip()] and "is stopped; nothing is lost" in errors


def test_what_json_cannot_hold_is_one_line(tmp_path):
    path = tmp_path / "study.json"
    path.write_text(study_of(tmp_path, WELL).model_dump_json())
    for value in ("{choices: [1e-3, !!binary aGk=]}", "&a [*a]", "[" * 3000):
        with pytest.raises(ConfigError) as raised:
            sweeps.load(path, [f"space.optim.lr={value}"])
        assert "\n" not in str(raised.value)
