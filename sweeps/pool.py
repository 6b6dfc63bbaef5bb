"""Runs a study on this machine: workers, their deaths, the repeats at the end, MLflow and the report.

result = run(study, workers=2)
"""

import math
import multiprocessing
import signal
import time
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from herd.run.errors import ConfigError, EnvironmentFault, Interrupted
from herd.run.files import write_atomic
from herd.run.folders import make_folder
from herd.run.schema import Config
from sweeps import checks, repeats, report, results, storages, tracking, worker
from sweeps.closing import closing
from sweeps.ledger import Ledger
from sweeps.results import Result
from sweeps.settings import Study
from sweeps.stopping import Stop, stop_signals
from sweeps.trial import STOP_S, Slot, slots

GLANCE_S = 0.2
MOST_DEATHS = 10  # of workers; what kills more of them will kill the next ones too


def run(study: Study, *, workers: int | None = None, command: str | None = None) -> Result:
    """Run trials until the budget is used, then the repeats, then write the report; goes on with a study begun before.

    command: what a person types to go on, for the message of an interruption. Raises ConfigError, EnvironmentFault,
    TrialsFail (the base itself cannot be run), or Interrupted; every trial that was cut off goes on next time.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers = {workers}: must be 1 or more")
    if workers is not None:
        study = study.model_copy(update={"launch": study.launch.model_copy(update={"workers": workers})})
    base = checks.check(study)
    optuna_study = storages.open_study(study, base)
    make_folder(study.home, "folder")
    write_atomic(study.base_copy, study.base.read_bytes())
    optuna_study.set_user_attr(worker.STOPPED, None)
    with tracking.of_study(study, base, optuna_study) as tracker, stop_signals() as stop:
        deadline = time.monotonic() + 3600 * (study.budget.hours or math.inf)
        crew = Crew(study, base, Ledger(optuna_study, study.trials), deadline)
        try:
            crew.work(stop)
            if time.monotonic() > deadline and crew.ledger.open():
                ended = f"{len(crew.ledger.ended())} of {study.trials} trials have ended"
                print(f"budget.hours = {study.budget.hours:g} are over: {ended}; the same command goes on", flush=True)
            with closing(optuna_study) as beat:
                if beat is None:
                    print(f"another command repeats the best trial of {study.name} and writes its report", flush=True)
                    return results.read(study, optuna_study)
                if study.repeats.seeds:
                    repeats.run(study, optuna_study, crew.slots, stop, beat)
                found = results.read(study, optuna_study)
                page = report.write(study, optuna_study, found)
                tracking.finish_study(tracker, study, found, page)
        except Interrupted:
            again = command or "sweeps.run(study)"
            raise Interrupted(f"{study.name} is stopped; nothing is lost, it goes on with: {again}") from None
    return found


class Crew:
    """The workers of one machine, one a slot, replaced when they die."""

    def __init__(self, study: Study, base: Config, ledger: Ledger, deadline: float) -> None:
        self.study, self.base, self.ledger, self.deadline = study, base, ledger, deadline
        self.slots = slots(study, accelerators())
        self.deaths = 0
        self.context = multiprocessing.get_context("spawn")
        self.at_work: dict[int, tuple[BaseProcess, Connection]] = {}

    def work(self, stop: Stop) -> None:
        """Return when no trial is left to run here. Raises what a worker raised, or Interrupted."""
        try:
            waiting = list(self.slots)
            while waiting or self.at_work:
                for slot in waiting:
                    self.at_work[slot.number] = self.start(slot)
                waiting = self.look()
                if stop.asked:
                    raise Interrupted("")
                if not waiting:
                    time.sleep(GLANCE_S)
        finally:
            self.send_home()

    def start(self, slot: Slot) -> tuple[BaseProcess, Connection]:
        """A worker process for a slot."""
        answers, theirs = self.context.Pipe(duplex=False)
        arguments = (self.study, self.base, slot, self.deadline, theirs)
        process = self.context.Process(target=worker.work, args=arguments, name=f"worker-{slot.number}")
        # Ctrl-C reaches the whole terminal: a worker holds it back from its first moment, and the command decides.
        resource_tracker.ensure_running()  # starting it would let the signal through again
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
        theirs.close()
        return process, answers

    def look(self) -> list[Slot]:
        """Take in what workers answered; the slots whose worker died and whose place is to be filled."""
        died = []
        for number, (process, answers) in list(self.at_work.items()):
            if process.is_alive() and not answers.poll():
                continue
            answer = _received(answers)
            process.join()
            del self.at_work[number]
            if answer == "nothing" and process.exitcode == 1:
                raise RuntimeError(f"{process.name} failed; its traceback is above")
            if answer in ("nothing", worker.SENT_AWAY):
                self.deaths += 1
                if self.deaths > MOST_DEATHS:
                    raise EnvironmentFault(f"{self.deaths} workers died ({process.exitcode}); see the kernel's log")
                died.append(self.slots[number])
            elif answer is not None:
                worker.raise_answer(answer)
        return died

    def send_home(self) -> None:
        """Stop the workers that are left and wait for them: each gives its trial back and ends its run."""
        for process, _ in self.at_work.values():
            process.terminate()
        for process, _ in self.at_work.values():
            process.join(STOP_S + 5)
            if process.is_alive():
                process.kill()
        self.at_work.clear()


def _received(answers: Connection) -> tuple[str, int] | str | None:
    """What a worker sent before it ended; "nothing" when it was killed."""
    try:
        return answers.recv() if answers.poll() else "nothing"
    except EOFError:
        return "nothing"
    finally:
        answers.close()


def accelerators() -> int:
    """Accelerators of this machine."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0
