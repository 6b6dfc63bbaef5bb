"""A study as one self-contained report.html and plots/*.png in its folder.

page = write(study, optuna_study, result)
"""

import base64
import io
import shlex
from pathlib import Path
from typing import Any

import optuna
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

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
    folder = study.home / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, (heading, caption, figure) in wide.items():
        image = _png(figure)
        write_atomic(folder / f"{name}.png", image)
        small = _png(narrow[name][2])
        pictures.append({"heading": heading, "caption": caption, "wide": _base64(image), "narrow": _base64(small)})
    page = study.home / "report.html"
    loader = ChoiceLoader([PackageLoader("sweeps", ""), PackageLoader("herd.report", "")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template(TEMPLATE).render(
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
    order = {"complete": 0, "pruned": 1, "failed": 2}
    front = {trial.number for trial in result.front}
    ranked = sorted(result.trials, key=lambda t: (t.number not in front, order[t.state], t.values))
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
    words = ["python", "-m", "distill", "--config", str(study.base)]
    words += [
        word for setting in [*study.set, *best.overrides, f"run.name={study.name}-best"] for word in ("--set", setting)
    ]
    return [shlex.join(words)]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _base64(image: bytes) -> str:
    return base64.b64encode(image).decode("ascii")
