"""Which trials of a study count: none twice, none lost, whoever runs them and however they die.

ledger = Ledger(optuna_study, trials=20)
ledger.recover()                      # trials whose worker is gone wait again, with the same settings and run folder
if ledger.room(): trial = optuna_study.ask(); ledger.claim(trial)

A trial that was running when its worker died ends as failed with the mark `lost`; a new one with `retry_of` takes its
place. Two workers that find it at once may make two; the younger of them, and trials beyond the budget, are void.
"""

import os
import socket
import time
from dataclasses import dataclass

import optuna
import psutil
from optuna.trial import FrozenTrial, TrialState

BEAT_S = 10.0
STALE_S = 90.0  # machines' clocks may differ by some of it
MOST_DEATHS = 3  # of one trial's run from outside, by want of memory for one


@dataclass(frozen=True)
class Ledger:
    study: optuna.Study
    trials: int
    """The budget."""

    def counted(self) -> list[FrozenTrial]:
        """Trials that stand for themselves, waiting ones too, the oldest first."""
        found = self.study.get_trials(deepcopy=False)
        return [trial for trial in found if not trial.user_attrs.keys() & {"lost", "void"}]

    def ended(self) -> list[FrozenTrial]:
        """Those that are over."""
        return [trial for trial in self.counted() if trial.state.is_finished()]

    def room(self) -> bool:
        """Whether there is a trial to start."""
        counted = self.counted()
        return len(counted) < self.trials or any(trial.state == TrialState.WAITING for trial in counted[: self.trials])

    def open(self) -> bool:
        """Whether a trial is still to start or to end."""
        return len(self.ended()) < self.trials

    def claim(self, trial: optuna.Trial) -> bool:
        """Take a trial that was just asked for; False (and it is void) when it is one too many."""
        counted = self.counted()
        mine = next(found for found in counted if found.number == trial.number)
        before = [found for found in counted if found.number < trial.number]
        origin = mine.user_attrs.get("retry_of")
        twin = origin is not None and any(found.user_attrs.get("retry_of") == origin for found in before)
        if twin or len(before) >= self.trials:
            trial.set_user_attr("void", "made twice" if twin else "beyond the budget")
            self.study.tell(trial.number, state=TrialState.FAIL)
            return False
        trial.set_user_attr("owner", owner())
        self.beat(trial)
        return True

    def beat(self, trial: optuna.Trial) -> None:
        """Say that its worker lives."""
        trial.set_user_attr("beat", time.time())

    def pause(self, trial: optuna.Trial) -> None:
        """Give a running trial back: whoever goes on with the study takes it up at once."""
        trial.set_user_attr("paused", True)

    def recover(self) -> None:
        """Let every trial whose worker is gone wait again."""
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if abandoned(frozen):
                self.retry(frozen)

    def retry(self, frozen: FrozenTrial, *, died: bool = False) -> bool:
        """Make a trial wait again in its run folder; False, and it is the caller's to end, when its run died too often.

        died: of itself, with its worker alive. A worker that is killed says nothing about the trial.
        """
        number, deaths = frozen.number, frozen.user_attrs.get("deaths", 0) + died
        if deaths >= MOST_DEATHS:
            return False
        retried = any(trial.user_attrs.get("retry_of") == number for trial in self.study.get_trials(deepcopy=False))
        # First the new one, then the end of the old: dying in between loses nothing: the next to look sees both.
        if not retried:
            kept = {key: frozen.user_attrs[key] for key in ("defaults", "run") if key in frozen.user_attrs}
            kept |= {"retry_of": number, "deaths": deaths}
            kept.setdefault("run", number)
            # A trial that waited and was killed before it took up its settings has them here alone.
            settings = frozen.system_attrs.get("fixed_params", {}) | frozen.params
            self.study.enqueue_trial(settings, user_attrs=kept)
        try:
            optuna.Trial(self.study, frozen._trial_id).set_user_attr("lost", True)
            self.study.tell(number, state=TrialState.FAIL)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):  # another worker was faster
            pass
        return True


def owner() -> str:
    """This process, as other processes of any machine can name it."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.2f}"


def abandoned(frozen: FrozenTrial) -> bool:
    """Whether nobody runs a running trial any more."""
    attributes = frozen.user_attrs
    started = frozen.datetime_start.timestamp() if frozen.datetime_start else 0.0
    return attributes.get("paused", False) or gone(
        attributes.get("owner", ""), max(attributes.get("beat", 0.0), started)
    )


def gone(owner: str, beat: float) -> bool:
    """Whether a process is no more: looked for where it is one of this machine, by its last sign of life elsewhere."""
    host, _, rest = owner.partition(" ")
    if host == socket.gethostname():
        pid, _, created = rest.partition(" ")
        try:
            return f"{psutil.Process(int(pid)).create_time():.2f}" != created
        except psutil.NoSuchProcess:
            return True
    return time.time() - beat > STALE_S
