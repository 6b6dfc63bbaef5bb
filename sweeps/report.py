"""A study as one self-contained report.html and plots/*.png in its folder.

page = write(study, optuna_study, result)
"""

import shlex
from pathlib import Path
from typing import Any

import optuna

from herd.report.pictures import fill_template, make_picture
from herd.report.style import NARROW, WIDE
from herd.run.files import write_atomic
from sweeps import plots
from sweeps.results import Result, Trial
from sweeps.settings import Study

TEMPLATE = "study.html.j2"
MOST_TRIALS = 30


def write(study: Study, optuna_study: optuna.Study, result: Result) -> Path:
    """Write plots and page, each file atomically; returns the page's path."""
    wide = plots.draw(study, optuna_study, result, WIDE)
    narrow = plots.draw(study, optuna_study, result, NARROW)
    pictures = [
        make_picture(heading, caption, figure, narrow[name][2], study.home / "plots" / f"{name}.png")
        for name, (heading, caption, figure) in wide.items()
    ]
    page = study.home / "report.html"
    html = fill_template(
        "sweeps",
        TEMPLATE,
        study=study,
        result=result,
        pictures=pictures,
        trials=_shown(result),
        counts={state: sum(t.state == state for t in result.trials) for state in ("complete", "pruned", "failed")},
        hours=sum(trial.seconds for trial in result.trials) / 3600,
        repeats=_repeats(result),
        commands=_commands(study, result.best),
        mlflow=optuna_study.user_attrs.get("mlflow_run_id"),
    )
    write_atomic(page, html)
    return page


def _shown(result: Result) -> list[Trial]:
    ranked = result.ranked()
    kept = ranked[:MOST_TRIALS]
    return kept + [trial for trial in ranked[MOST_TRIALS:] if trial.defaults]


def _repeats(result: Result) -> dict[str, Any] | None:
    if result.repeats is None or result.repeats.get("interval") is None:
        return None
    low, high = result.repeats["interval"]
    verdict = "differ" if low > 0 or high < 0 else "cannot be told apart"
    return result.repeats | {"verdict": verdict, "low": low, "high": high}


def _commands(study: Study, best: Trial | None) -> list[str]:
    """How to train the best trial's settings as a run of its own."""
    if best is None:
        return []
    words = [*(study.launch.program or ["python", "-m", "distill"]), "--config", str(study.base)]
    settings = [*study.set, *best.overrides, f"run.seed={study.seed}", f"run.name={study.name}-best"]
    settings += [f"run.folder={study.home}"] if study.launch.program else []  # which programs are always given
    words += [word for setting in settings for word in ("--set", setting)]
    return [shlex.join(words)]
