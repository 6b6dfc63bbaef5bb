"""Takes trials from a study one after another and runs them, until the budget is used or it is told to stop.

    work(study, base, slot, deadline, answers)          a process of its own, started by sweeps.pool

Every trial ends told: complete, pruned (by the pruner, by its time, by NaN) or failed. One that is cut off waits again.
"""

import math
import os
import signal
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from herd.run import config
from herd.run.errors import ENVIRONMENT, NUMERICAL, ConfigError, EnvironmentFault, HerdError, Interrupted
from herd.run.schema import Config
from sweeps import metrics, spaces, storages, tracking
from sweeps.ledger import BEAT_S, Ledger
from sweeps.settings import PRUNERS_ON_STEPS, Study
from sweeps.storages import Answer
from sweeps.trial import Slot, TrialRun, clear_checkpoints, setting_aside, signal_of

GLANCE_S, WATCH_S = 0.25, 1.0
STOPPED = "stopped"
SENT_AWAY = ("", Interrupted.exit_code)
"""The answer of a worker that was told to stop: by its command, or by somebody who meant this one alone."""
MOST_FAILURES = 3  # trials in a row, before any has succeeded


class TrialsFail(HerdError):
    """The study's trials fail in a way that the next ones would too; carries their exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Cut(Exception):
    """A run that was cut off: its trial is not over."""


class Pruned(Exception):
    """A trial that has seen enough."""


class Failed(Exception):
    """A run that ended with an error of its own."""

    def __init__(self, code: int, line: str, log: Path | None = None) -> None:
        super().__init__(line)
        self.code = code
        self.log = log


@dataclass
class Worker:
    study: Study
    base: Config
    slot: Slot
    optuna_study: optuna.Study
    deadline: float = math.inf
    """time.monotonic() after which no trial starts."""
    stopping: bool = False
    parent: int = field(default_factory=os.getppid)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.optuna_study, self.study.trials)

    def work(self) -> None:
        """Run trials until there is none to start. Raises Interrupted when told to stop, TrialsFail to stop all."""
        while True:
            self.check_stop()
            with storages.turn(self.study):  # two that recover at once would make two of a lost trial
                self.on_storage(self.ledger.recover)
            if not self.on_storage(self.ledger.open) or time.monotonic() > self.deadline:
                return
            if not self.on_storage(self.ledger.room):
                time.sleep(WATCH_S)  # the last trials run elsewhere, and may be left behind there
                continue
            with storages.turn(self.study):
                self.check_stop()  # again: what was recovered may be what stopped the study
                trial = self.on_storage(self.ask)
                mine = self.on_storage(lambda trial=trial: self.ledger.claim(trial))
            if mine:
                with suppress(UpdateFinishedTrialError):  # this worker was taken for dead, and another has its trial
                    self.run(trial)

    def ask(self) -> optuna.Trial:
        """The next trial: one that waits, or a new draw that no other worker makes."""
        count = len(self.optuna_study.get_trials(deepcopy=False))
        host = 0 if self.study.storage_url.startswith("sqlite") else zlib.crc32(socket.gethostname().encode())
        self.optuna_study.sampler = storages.make_sampler(self.study.sampler, count, self.slot.number, host)
        return self.optuna_study.ask()

    def run(self, trial: optuna.Trial) -> None:
        """One trial from its settings to its end in the storage."""
        started = time.monotonic()
        overrides = self.on_storage(lambda: spaces.suggest(trial, self.study.space))
        name = run_name(trial)
        facts = {"folder": str(self.study.home / name), "overrides": overrides}
        self.on_storage(lambda: [trial.set_user_attr(key, value) for key, value in facts.items()])
        logs = f"{facts['folder']}{'.log' if self.study.seeds == 1 else '-seed-*.log'}"
        print(f"trial {trial.number} starts  {'  '.join(overrides)}  log: {logs}", flush=True)
        try:
            values = self.values(trial, name, overrides, started)
        except Cut:
            self.on_storage(lambda: self.ledger.pause(trial))
            raise Interrupted("") from None
        except ConfigError as error:  # an objective that no run reports
            self.stop_all(str(error), error.exit_code, trial)
        except Pruned as reason:
            self.tell(trial, TrialState.PRUNED, why=str(reason))
        except Failed as error:
            self.failed(trial, error)
        else:
            self.tell(trial, TrialState.COMPLETE, values)
        self.say(trial, time.monotonic() - started)

    def values(self, trial: optuna.Trial, name: str, overrides: list[str], started: float) -> list[float]:
        """The objectives' values, means over the trial's seeds."""
        study, base, rows = self.study, self.settings(overrides), []
        for index in range(study.seeds):
            one = name if study.seeds == 1 else f"{name}-seed-{study.seed + index}"
            run = TrialRun.of(study, name=one, overrides=overrides, seed=study.seed + index)
            self.follow(trial, run, base, started)
            with setting_aside(run):
                names = [objective.metric for objective in study.objectives]
                found = {name: metrics.final(run.folder, name) for name in names}
            if bad := [f"{metric} = {value}" for metric, value in found.items() if not metrics.usable(value)]:
                raise Pruned(", ".join(bad))
            rows.append(list(found.values()))
            if study.seeds > 1 and len(study.objectives) == 1:
                self.on_storage(lambda index=index: trial.report(rows[-1][0], index))
                if index + 1 < study.seeds and self.on_storage(trial.should_prune):
                    raise Pruned(f"seed {index + 1} of {study.seeds}")
        return [sum(column) / len(column) for column in zip(*rows, strict=True)]

    def follow(self, trial: optuna.Trial, run: TrialRun, base: Config, started: float) -> None:
        """Run one training to its end. Raises Pruned, Failed or Cut, with nothing left running."""
        if run.is_done():
            list(self.report(trial, self.stream(run, base), set()))
            return
        run.start(self.slot, self.tags(trial))
        with setting_aside(run):
            try:
                self.watch(trial, run, base, started)
            finally:
                run.stop()
                self.remember_run(trial, run.folder)
        code = run.code()
        if code == 0:
            run.finish()
            return
        if code == NUMERICAL:
            raise Pruned(run.last_words())
        raise Failed(code or 0, run.last_words(), run.log)

    def watch(self, trial: optuna.Trial, run: TrialRun, base: Config, started: float) -> None:
        """Report what the run reaches until it ends. Raises Pruned and Cut while it still runs."""
        stream, seen = self.stream(run, base), set()
        pruned = self.study.pruner.kind in PRUNERS_ON_STEPS
        beaten, limit = time.monotonic(), self.study.budget.trial_minutes
        while True:
            over = run.code() is not None
            for step in self.report(trial, stream, seen):
                # At its last step there is nothing left to save, and what it ends with is worth knowing.
                if pruned and not over and step < base.run.steps and self.on_storage(trial.should_prune):
                    raise Pruned(f"step {step}")
            if over:
                return
            if limit is not None and time.monotonic() - started > 60 * limit:
                raise Pruned(f"budget.trial_minutes = {limit:g} are over")
            if time.monotonic() - beaten > BEAT_S:
                beaten = time.monotonic()
                self.on_storage(lambda: self.ledger.beat(trial))
            if self.must_stop():
                raise Cut
            time.sleep(GLANCE_S)

    def settings(self, overrides: list[str]) -> Config:
        """What a trial with these overrides runs. Raises Failed for values right one by one and wrong together."""
        try:
            return config.load(self.study.base_copy, [*self.study.set, *overrides])
        except ConfigError as error:
            raise Failed(error.exit_code, str(error)) from None

    def stream(self, run: TrialRun, base: Config) -> metrics.MetricsStream:
        """What the run writes, from its students' first step; a program's steps are its own."""
        head_start = 0 if self.study.launch.program else base.teacher.head_start
        return metrics.MetricsStream(run.folder / "metrics.jsonl", head_start)

    def report(self, trial: optuna.Trial, stream: metrics.MetricsStream, seen: set[int]) -> Iterator[int]:
        """Tell the storage of new values, one run and one objective only; the steps it was told of."""
        if len(self.study.objectives) > 1 or self.study.seeds > 1:
            return
        for step, value in stream.new(self.study.objectives[0].metric):
            if step not in seen and metrics.usable(value):
                seen.add(step)
                self.on_storage(lambda step=step, value=value: trial.report(value, step))
                yield step

    def failed(self, trial: optuna.Trial, error: Failed) -> None:
        """A run that failed by itself: this trial's own fault, or one that all trials would meet."""
        frozen = next(t for t in self.on_storage(self.optuna_study.get_trials) if t.number == trial.number)
        line = f"trial {trial.number}: {error}" + (f" (its log: {error.log})" if error.log else "")
        if error.code == ENVIRONMENT:
            self.stop_all(line, ENVIRONMENT, trial)
        from_outside = not error.code or signal_of(error.code) or error.code == Interrupted.exit_code
        if from_outside and self.on_storage(lambda: self.ledger.retry(frozen, died=True)):
            return
        ended = self.on_storage(self.ledger.ended)
        sound = any(t.state != TrialState.FAIL for t in ended)
        if frozen.user_attrs.get("defaults") or (len(ended) >= MOST_FAILURES - 1 and not sound):
            self.stop_all(line, ENVIRONMENT if from_outside else error.code, trial)
        self.tell(trial, TrialState.FAIL, why=str(error))

    def tell(self, trial: optuna.Trial, state: TrialState, values: list[float] | None = None, why: str = "") -> None:
        """End a trial in the storage; one that another worker ended meanwhile stays as it is."""
        if why:
            self.on_storage(lambda: trial.set_user_attr("why", why))
        told = self.on_storage(lambda: self.optuna_study.tell(trial.number, values, state=state, skip_if_finished=True))
        if "lost" not in told.user_attrs:  # else another worker goes on with its runs
            name = run_name(trial)
            for folder in (self.study.home / name, *self.study.home.glob(f"{name}-seed-*")):
                clear_checkpoints(folder)

    def stop_all(self, line: str, code: int, trial: optuna.Trial) -> None:
        """Raise TrialsFail here, and have the workers of every other machine stop too; the trial waits for a mend."""
        # In this order, so that no worker that is not told to stop finds the trial waiting.
        self.on_storage(lambda: self.optuna_study.set_user_attr(STOPPED, [line, code]))
        self.on_storage(lambda: self.ledger.pause(trial))
        raise TrialsFail(f"{self.study.name} stops: {line}", code)

    def check_stop(self) -> None:
        """Raise Interrupted when this worker, or the whole study, was told to stop."""
        if self.must_stop():
            raise Interrupted("")
        if stopped := self.on_storage(lambda: self.optuna_study.user_attrs).get(STOPPED):
            line, code = stopped
            raise TrialsFail(f"{self.study.name} stops: {line}", code)

    def must_stop(self) -> bool:
        """Told to stop, or left behind by a command that was killed."""
        return self.stopping or os.getppid() != self.parent

    def tags(self, trial: optuna.Trial) -> list[str]:
        """Overrides that hang the trial's MLflow run below the study's."""
        facts = {"sweep.study": self.study.name, "sweep.trial": str(trial.number)}
        return self.on_storage(lambda: tracking.run_tags(self.optuna_study, facts))

    def remember_run(self, trial: optuna.Trial, folder: Path) -> None:
        """Put the MLflow run's id beside the trial, so that each interface leads to the other."""
        run_id = metrics.mlflow_run(folder)
        if run_id:
            self.on_storage(lambda: trial.set_user_attr("mlflow_run_id", run_id))

    def on_storage(self, call: Callable[[], Answer]) -> Answer:
        """An answer of the storage, which may be busy for a while."""
        return storages.patiently(call, self.study.storage_url)

    def say(self, trial: optuna.Trial, seconds: float) -> None:
        """One line about a trial that is over."""
        ended = self.on_storage(self.ledger.ended)
        mine = next((t for t in ended if t.number == trial.number), None)
        if mine is None:  # it waits again
            return
        word = {TrialState.COMPLETE: "", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}[mine.state]
        numbers = " ".join(f"{value:.4g}" for value in mine.values or ())
        if word:  # one that is pruned has its last value for Optuna, which is no result
            numbers = f"{word}: {mine.user_attrs.get('why', '')}"
        place = f"{len(ended)}/{self.study.trials}"
        words = "  ".join(mine.user_attrs["overrides"])
        print(f"trial {trial.number} ({place})  {numbers}  {seconds:.0f} s  {words}", flush=True)


def run_name(trial: optuna.Trial) -> str:
    """What the runs of a trial, and of those it takes the place of, are called."""
    return f"trial-{trial.user_attrs.get('run', trial.number):04d}"


def work(study: Study, base: Config, slot: Slot, deadline: float, answers: Connection) -> None:
    """Body of a worker process: its error, if any, goes back through the connection `answers`."""
    worker = None
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        worker = Worker(study, base, slot, storages.open_study(study, base), deadline)
        signal.signal(signal.SIGTERM, lambda *_: setattr(worker, "stopping", True))
        worker.work()
        answer = None
    except HerdError as error:
        answer = (str(error), error.exit_code)
    with suppress(BrokenPipeError):  # its command is gone
        answers.send(answer)


def raise_answer(answer: tuple[str, int]) -> None:
    """Raise in the parent what a worker met."""
    message, code = answer
    if code == ENVIRONMENT:
        raise EnvironmentFault(message)
    raise TrialsFail(message, code)
