"""Samplers and storages by name, without any run."""

import contextlib
import json
import math
import sqlite3
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from pydantic import ValidationError

from herd.run.errors import ConfigError, DataError, DiskFull, EnvironmentFault
from sweeps import Range, checks, results, spaces, storages
from sweeps.drivers import check_driver
from sweeps.settings import Sampler, file_of
from tests.sweeps import studies

SPACE = {"optim.lr": Range(low=1e-4, high=1e-1, log=True), "optim.decay": Range(low=0.0, high=1.0)}


def distance(trial: optuna.Trial) -> float:
    """From the known best, a rate of 1e-2 and a decay of 0.7."""
    return (math.log10(trial.params["optim.lr"]) + 2) ** 2 + (trial.params["optim.decay"] - 0.7) ** 2


@pytest.mark.parametrize(("kind", "trials"), [("tpe", 40), ("gp", 16), ("cmaes", 60), ("nsga2", 72)])
def test_every_sampler_made_anew_for_each_trial_closes_in_on_a_known_best(kind, trials):
    storages.quiet()
    study = optuna.create_study()
    for number in range(trials):  # as a worker does it
        study.sampler = storages.make_sampler(Sampler(kind=kind), number)
        trial = study.ask()
        spaces.suggest(trial, SPACE)
        study.tell(trial, distance(trial))
    values = [trial.value for trial in study.trials]
    assert statistics.median(values[-5:]) < 0.5 * statistics.median(values[:10])


@pytest.mark.parametrize("url", ["redis://here", "journal:", "grpc://host", "study.db"])
def test_a_url_that_names_no_storage_is_refused_with_those_that_do(tmp_path, url):
    with pytest.raises(ValidationError, match="no storage; use sqlite:///FILE"):
        studies.make(tmp_path, storage=url)


@pytest.mark.parametrize(
    ("url", "driver"),
    [("mysql://me@host/optuna", "mysqlclient"), ("postgresql+pg8000://me@host/optuna", "pg8000")],
)
def test_a_missing_driver_is_named(url, driver):
    with pytest.raises(EnvironmentFault, match=f"its driver is missing; pip install {driver}$"):
        storages.patiently(lambda: storages.open_storage(url), url)


@pytest.mark.parametrize("kind", ["sqlite:///", "journal:"])
def test_a_file_that_is_no_storage_is_named_at_once_and_left_as_it_is(tmp_path, kind):
    path = tmp_path / "notes.txt"
    path.write_text("no storage at all, but somebody's notes\n")
    with pytest.raises(ConfigError, match=r"notes.txt: the file is no"):
        storages.open_storage(f"{kind}{path}")
    assert path.read_text() == "no storage at all, but somebody's notes\n"


@pytest.mark.parametrize(("url", "file"), [
    ("journal:///shared/a.log", "///shared/a.log"), ("journal:a.log", "a.log"),
    ("sqlite:///a.db?timeout=30", "a.db"), ("sqlite:////tmp/a.db", "/tmp/a.db"),
])  # fmt: skip
def test_a_storages_file_is_the_one_that_is_opened(url, file):
    assert file_of(url) == Path(file)


def test_a_folder_for_a_journal_and_a_damaged_database_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"a folder; give the name of a file, such as .*study.log"):
        storages.open_storage(f"journal:{tmp_path}")
    url = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.create_study(storage=storages.open_storage(url), study_name="whole")
    content = (tmp_path / "study.db").read_bytes()
    (tmp_path / "study.db").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"study.db is damaged \(.*malformed.*\); restore it, or give another"):
        storages.patiently(lambda: optuna.load_study(study_name="whole", storage=storages.open_storage(url)), url)


def test_a_url_with_a_port_that_is_none_is_one_line_without_its_password():
    with pytest.raises(ConfigError, match="no URL of a database") as caught:
        check_driver("postgresql://me:secret@host:abc/db")
    assert "secret" not in str(caught.value)


def test_the_first_trials_are_made_up_for_when_whoever_made_the_study_died_before(tmp_path, monkeypatch):
    monkeypatch.setattr(storages, "FIRST_TRIALS_S", 0.0)
    study = studies.make(
        tmp_path, space={"optim.lr": Range(low=0.002, high=0.005, step=0.001)}, sampler={"kind": "grid"}
    )
    found = optuna.create_study(storage=storages.open_storage(study.storage_url), study_name=study.name)
    found.enqueue_trial({"optim.lr": 0.002})
    for _ in range(2):
        found = storages.open_study(study, checks.check(study))
    points = [trial.system_attrs["fixed_params"]["optim.lr"] for trial in found.trials]
    assert sorted(points) == [0.002, 0.003, 0.004, 0.005]


@pytest.mark.parametrize("kind", ["sqlite:///", "journal:"])
def test_no_two_workers_take_the_same_trial_that_waits(tmp_path, kind):
    study = studies.make(tmp_path, storage=f"{kind}{tmp_path / 'storage'}", enqueue_defaults=False)
    found = storages.open_study(study, checks.check(study))
    for rate in range(1, 25):
        found.enqueue_trial({"optim.lr": rate / 1000})

    def take(_):
        mine = optuna.load_study(study_name=study.name, storage=storages.open_storage(study.storage_url))
        taken = []
        for _ in range(6):
            with storages.turn(study):
                taken.append(mine.ask().number)
        return taken

    with ThreadPoolExecutor(4) as workers:
        numbers = [number for taken in workers.map(take, range(4)) for number in taken]
    assert sorted(numbers) == list(range(24))


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_trials_are_ranked_from_the_best_on(tmp_path, direction):
    objectives = [{"metric": "heldout/scout", "direction": direction}]
    study = studies.make(tmp_path, objectives=objectives, enqueue_defaults=False)
    found = storages.open_study(study, checks.check(study))
    for value in (2.0, 1.0, 3.0):
        found.add_trial(optuna.trial.create_trial(value=value))
    ranked = [trial.values[0] for trial in results.read(study, found).ranked() if trial.values]
    assert ranked == sorted(ranked, reverse=direction == "maximize") and len(ranked) == 3


def test_a_storage_that_does_not_answer_is_asked_for_a_while_and_its_password_kept(monkeypatch):
    waits = []
    monkeypatch.setattr(storages.time, "sleep", waits.append)

    def refuse():
        raise ConnectionRefusedError("connection refused")

    with pytest.raises(EnvironmentFault, match="postgresql://host/optuna does not answer") as caught:
        storages.patiently(refuse, "postgresql://me:secret@host/optuna")
    assert waits == list(storages.PATIENCE_S) and "secret" not in str(caught.value)


def test_a_full_disk_under_the_storage_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(storages.time, "sleep", lambda _: pytest.fail("waited"))

    def write():
        try:
            raise sqlite3.OperationalError("database or disk is full")
        except sqlite3.OperationalError as error:
            raise StorageInternalError("An exception is raised during the commit.") from error

    with pytest.raises(DiskFull, match=r"cannot write .*study.db: the disk is full"):
        storages.patiently(write, f"sqlite:///{tmp_path / 'study.db'}")


def test_a_journals_last_line_that_was_torn_is_cut_before_the_next_is_written(tmp_path):
    study = studies.make(tmp_path, storage=f"journal:{tmp_path / 'study.log'}")
    base = checks.check(study)
    storages.open_study(study, base)
    journal = tmp_path / "study.log"
    whole = journal.read_bytes()
    for torn in (b'{"op_code": 4, "study', whole[:-1].rpartition(b"\n")[2][:20]):
        journal.write_bytes(whole + torn)
        assert storages.open_study(study, base).user_attrs[storages.SETTINGS]
        now = journal.read_bytes()  # Optuna notes the asking too
        assert now.startswith(whole) and all(json.loads(line) for line in now.splitlines())
    journal.write_bytes(whole[: len(whole) // 2] + b"garbage\n" + whole[len(whole) // 2 :])
    with pytest.raises(DataError, match=r"study\.log is damaged"):
        storages.open_study(study, base)


def test_a_folder_or_another_programs_database_is_told_at_once(tmp_path):
    study = studies.make(tmp_path, storage=f"sqlite:///{tmp_path}")
    with pytest.raises(ConfigError, match="a folder; give the name of a file"):
        storages.open_study(study, checks.check(study))
    file = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("create table studies(a)")
    other = study.model_copy(update={"storage": f"sqlite:///{file}"})
    started = time.monotonic()
    with pytest.raises(DataError, match=r"other\.db is damaged"):
        storages.open_study(other, checks.check(study))
    assert time.monotonic() - started < 30
