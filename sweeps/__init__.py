"""Optuna studies over a configuration; each trial is a real training run in its own process and folder.

    study = sweeps.load("configs/sweeps/rates.yaml")            # or sweeps.Study(name=..., base=..., space=..., ...)
    result = sweeps.run(study, workers=2)                       # result.best.values, result.best.overrides

python -m sweeps --study configs/sweeps/rates.yaml --workers 2
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sweeps.pool import run
    from sweeps.ranges import Choices, Range
    from sweeps.results import Result
    from sweeps.settings import Objective, Study, load

__all__ = ["Choices", "Objective", "Range", "Result", "Study", "load", "run"]

_HOMES = {
    "Choices": "sweeps.ranges",
    "Objective": "sweeps.settings",
    "Range": "sweeps.ranges",
    "Result": "sweeps.results",
    "Study": "sweeps.settings",
    "load": "sweeps.settings",
    "run": "sweeps.pool",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sweeps' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
