"""Samplers and storages by name, without any run."""

import math
import statistics

import optuna
import pytest
from pydantic import ValidationError

from herd.run.errors import EnvironmentFault
from sweeps import Range, spaces, storages
from sweeps.settings import Sampler
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


def test_a_storage_that_does_not_answer_is_asked_for_a_while_and_its_password_kept(monkeypatch):
    waits = []
    monkeypatch.setattr(storages.time, "sleep", waits.append)

    def refuse():
        raise ConnectionRefusedError("connection refused")

    with pytest.raises(EnvironmentFault, match="postgresql://host/optuna does not answer") as caught:
        storages.patiently(refuse, "postgresql://me:secret@host/optuna")
    assert waits == list(storages.PATIENCE_S) and "secret" not in str(caught.value)
