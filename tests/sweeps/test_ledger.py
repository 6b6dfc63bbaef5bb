"""Which trials count, over a real storage, without any run."""

import socket

import optuna
import pytest
from optuna.trial import TrialState

from sweeps.ledger import MOST_DEATHS, Ledger

SPACE = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}


@pytest.fixture
def ledger(tmp_path):
    return Ledger(optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}"), trials=2)


def start(ledger, *, pid=2**22 + 1):
    """A trial claimed by a worker that is gone: no process has such an id."""
    trial = ledger.study.ask(SPACE)
    assert ledger.claim(trial)
    trial.set_user_attr("owner", f"{socket.gethostname()} {pid} 0.00")
    return trial


def test_a_trial_survives_any_number_of_killed_workers_with_its_settings(ledger):
    first = start(ledger)
    for _ in range(3 * MOST_DEATHS):
        ledger.recover()
        again = start(ledger)
        assert again.params == first.params and again.user_attrs["run"] == first.number
    assert ledger.ended() == [] and len(ledger.counted()) == 1


def test_settings_that_wait_survive_a_worker_killed_before_it_took_them_up(ledger):
    ledger.study.enqueue_trial({"x": 0.25}, user_attrs={"defaults": True})
    trial = ledger.study.ask()  # and no more
    assert trial.params == {} and ledger.retry(ledger.study.trials[trial.number])
    again = ledger.study.ask(SPACE)
    assert again.params == {"x": 0.25} and again.user_attrs["defaults"]


def test_a_run_that_dies_of_itself_is_left_to_its_worker_after_some_tries(ledger):
    trial = start(ledger)
    for death in range(1, MOST_DEATHS + 1):
        frozen = ledger.study.trials[trial.number]
        assert ledger.retry(frozen, died=True) == (death < MOST_DEATHS)
        if death < MOST_DEATHS:
            trial = start(ledger)
    assert [left.state for left in ledger.counted()] == [TrialState.RUNNING]


def test_two_workers_that_find_a_lost_trial_at_once_make_one_that_counts(ledger):
    trial = start(ledger)
    lost = ledger.study.trials[trial.number]
    for _ in range(2):  # what both would do that saw no retry yet
        ledger.study.enqueue_trial(lost.params, user_attrs={"retry_of": lost.number, "run": lost.number})
    ledger.recover()
    taken, twin = ledger.study.ask(SPACE), ledger.study.ask(SPACE)
    assert ledger.claim(taken) and not ledger.claim(twin)
    assert len(ledger.counted()) == 1


def test_trials_beyond_the_budget_are_void(ledger):
    asked = [ledger.study.ask(SPACE) for _ in range(3)]
    assert [ledger.claim(trial) for trial in asked] == [True, True, False]
    assert not ledger.room()
