"""What a study has found: its trials, the best of them, and what repeating it with fresh seeds gave.

result = read(study, optuna_study); result.best.values, result.best.overrides, result.table()
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from sweeps.ledger import Ledger
from sweeps.settings import Study

REPEATS = "repeats"


@dataclass(frozen=True)
class Trial:
    number: int
    state: str
    """complete, pruned or failed."""
    values: tuple[float, ...]
    overrides: tuple[str, ...]
    folder: Path | None
    seconds: float
    why: str
    defaults: bool
    mlflow_run_id: str | None


@dataclass(frozen=True)
class Result:
    objectives: tuple[str, ...]
    signs: tuple[int, ...]
    """1 for an objective that is minimised, -1 for one that is maximised."""
    trials: tuple[Trial, ...]
    """Those that count and are over."""
    front: tuple[Trial, ...]
    """The best trial, or those no other is better than in every objective, by the first one."""
    repeats: dict[str, Any] | None
    """Paired values of the best and of the defaults over fresh seeds, with the interval of their difference."""

    @property
    def best(self) -> Trial | None:
        """The first of the front; None without a complete trial."""
        return self.front[0] if self.front else None

    @property
    def default(self) -> Trial | None:
        """Trial 0, the base as it is."""
        return next((trial for trial in self.trials if trial.defaults and trial.state == "complete"), None)

    def ranked(self) -> list[Trial]:
        """The front, then the other complete trials from the best on, then those that were pruned or failed."""
        order = {"complete": 0, "pruned": 1, "failed": 2}
        return sorted(
            self.trials,
            key=lambda trial: (
                trial not in self.front,
                order[trial.state],
                [sign * value for sign, value in zip(self.signs, trial.values, strict=False)],
            ),
        )

    def table(self, most: int = 10) -> str:
        """The best trials as text, and the defaults among them."""
        shown = [trial for trial in self.ranked() if trial.state == "complete"][:most]
        if self.default and self.default not in shown:
            shown.append(self.default)
        lines = [f"{'trial':>6}  {'  '.join(self.objectives)}"]
        for trial in shown:
            mark = " (defaults)" if trial.defaults else ""
            numbers = "  ".join(f"{value:.5g}" for value in trial.values)
            lines.append(f"{trial.number:>6}  {numbers}  {'  '.join(trial.overrides)}{mark}")
        counts = {
            state: sum(trial.state == state for trial in self.trials) for state in ("complete", "pruned", "failed")
        }
        lines.append(f"{len(self.trials)} trials: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
        if self.repeats and self.repeats.get("interval"):
            difference, (low, high) = self.repeats["difference"], self.repeats["interval"]
            pairs = f"{self.repeats['pairs']} fresh seeds, paired"
            lines.append(f"best less defaults, {pairs}: {difference:+.4f} [{low:+.4f}, {high:+.4f}]")
        elif self.repeats and self.best.defaults:
            again = [value for value in self.repeats["values"]["best"] if value is not None]
            if again:
                mean = sum(again) / len(again)
                where = f" in {self.objectives[0]}" if len(self.objectives) > 1 else ""
                lines.append(f"the defaults are the best{where}; {len(again)} fresh seeds give {mean:.5g} on average")
        return "\n".join(lines)


def read(study: Study, optuna_study: optuna.Study) -> Result:
    """The study as it stands in its storage."""
    ended = Ledger(optuna_study, study.trials).ended()
    trials = {trial.number: _trial(trial) for trial in ended}
    complete = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    signs = tuple(1 if objective.direction == "minimize" else -1 for objective in study.objectives)
    if not complete:
        front = []
    elif len(study.objectives) == 1:
        front = [optuna_study.best_trial.number]
    else:
        front = [trial.number for trial in sorted(optuna_study.best_trials, key=lambda one: signs[0] * one.values[0])]
    repeats = optuna_study.user_attrs.get(REPEATS)
    if repeats is not None and repeats["trial"] not in front[:1]:  # a better trial has been found since
        repeats = None
    return Result(
        objectives=tuple(objective.metric for objective in study.objectives),
        signs=signs,
        trials=tuple(trials.values()),
        front=tuple(trials[number] for number in front),
        repeats=repeats,
    )


def _trial(frozen: FrozenTrial) -> Trial:
    attributes = frozen.user_attrs
    names = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    return Trial(
        number=frozen.number,
        state=names[frozen.state],
        values=tuple(frozen.values) if frozen.state == TrialState.COMPLETE else (),
        overrides=tuple(attributes.get("overrides", ())),
        folder=Path(attributes["folder"]) if "folder" in attributes else None,
        seconds=frozen.duration.total_seconds() if frozen.duration else 0.0,
        why=attributes.get("why", ""),
        defaults=attributes.get("defaults", False),
        mlflow_run_id=attributes.get("mlflow_run_id"),
    )
