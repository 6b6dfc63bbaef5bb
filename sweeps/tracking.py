"""A study in MLflow: one parent run, its trials below it, the best of them registered.

with of_study(study, base, optuna_study) as tracker: ...
finish_study(tracker, study, result, page)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import optuna

from herd.run import config_text
from herd.run.errors import Interrupted
from herd.run.schema import Config
from herd.run.store import shown
from herd.run.tracking import Tracker, open_tracker
from sweeps.results import Result
from sweeps.settings import Study

REACH_S = 20.0


@contextmanager
def of_study(study: Study, base: Config, optuna_study: optuna.Study) -> Iterator[Tracker]:
    """The study's MLflow run, which trials of any machine find by the id it leaves in the storage."""
    tracker = open_tracker(
        study.home,
        experiment=base.tracking.experiment,
        run_name=study.name,
        uri=base.tracking.uri,
        config=study.model_dump(mode="json"),
        tags={"herd.role": "study", "sweep.study": study.name, "sweep.storage": shown(study.storage_url)},
        enabled=base.tracking.enabled,
    )
    tracker.flush(REACH_S)
    if tracker.run_id and not optuna_study.user_attrs.get("mlflow_run_id"):
        optuna_study.set_user_attr("mlflow_run_id", tracker.run_id)
    try:
        yield tracker
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED")
        raise
    tracker.finish()


def run_tags(optuna_study: optuna.Study, facts: Mapping[str, str]) -> list[str]:
    """Overrides that hang a run's MLflow run below the study's, with tags of its own."""
    parent = optuna_study.user_attrs.get("mlflow_run_id")
    words = [f"tracking.tags={config_text.write_inline(dict(facts))}"]
    return words + ([f"tracking.parent={parent}"] if parent else [])


def finish_study(tracker: Tracker, study: Study, result: Result, page: Path) -> None:
    """Numbers, plots and the report of a study that is over, and its best students with the alias `<study>-best`."""
    counts = {
        f"study/{state}": sum(trial.state == state for trial in result.trials)
        for state in ("complete", "pruned", "failed")
    }
    tracker.metrics(counts | {"study/seconds": sum(trial.seconds for trial in result.trials)}, 0)
    for path in (page, *sorted((study.home / "plots").glob("*.png"))):
        tracker.artifact(path, folder="report")
    best = result.best
    if best is None or best.folder is None:
        return
    tracker.metrics({f"best/{name}": value for name, value in zip(result.objectives, best.values, strict=True)}, 0)
    tracker.tags({"sweep.best_trial": str(best.number), "sweep.best_run": best.mlflow_run_id or ""})
    metrics = dict(zip(result.objectives, best.values, strict=True))
    for student in sorted((best.folder / "students").glob("*")):
        tracker.model(
            f"{study.name}-{student.name}", student, role="student", alias=f"{study.name}-best", metrics=metrics
        )
