"""What a run folder says about itself: config.yaml, metrics.jsonl, evals.json, mlflow.json, run.json.

    record = read_run(Path("runs/nano")); record.students; record.column("heldout/teacher")

Every file is optional (a run may have crashed, or still run); what cannot be read is listed in `problems`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from herd.run.errors import DataError

FILES = ("config.yaml", "metrics.jsonl", "evals.json", "mlflow.json", "run.json")


class Series(NamedTuple):
    """One logged quantity over the steps at which it was logged."""

    step_S: NDArray[np.float64]
    value_S: NDArray[np.float64]


@dataclass(frozen=True)
class Record:
    """The run's own words. `steps` is in order of step, each step once (a resumed run logs some steps again)."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    mlflow: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.config.get("run", {}).get("name", self.folder.name)

    @property
    def teacher_mode(self) -> str | None:
        """`codistill`, `frozen`, `none`, or None where the configuration is missing."""
        return self.config.get("teacher", {}).get("mode")

    @property
    def students(self) -> list[str]:
        """In the configuration's order, then any that only metrics or evaluations know."""
        names = dict.fromkeys(self.config.get("students", {}))
        names.update(dict.fromkeys(key.split("/")[1] for key in self.keys if key.startswith("student/")))
        names.update(dict.fromkeys(model_of(e) for e in self.entries if e.get("role") in ("student", "export")))
        return list(names)

    @property
    def models(self) -> list[str]:
        """The teacher, if this run has one, then the students."""
        learned = any(key.startswith("teacher/") or key.endswith("/teacher") for key in self.keys)
        evaluated = any(entry.get("role") == "teacher" for entry in self.entries)
        has_teacher = learned or evaluated or self.teacher_mode in ("codistill", "frozen")
        return (["teacher"] if has_teacher else []) + self.students

    @property
    def keys(self) -> list[str]:
        """Every quantity that was logged at some step."""
        return list(dict.fromkeys(key for step in self.steps for key in step))

    @property
    def last_step(self) -> int:
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def planned_steps(self) -> int | None:
        """The students' steps, after those of the teacher's head start."""
        steps = self.config.get("run", {}).get("steps")
        ahead = self.config.get("teacher", {}).get("head_start", 0) if self.teacher_mode == "codistill" else 0
        return None if steps is None else steps + ahead

    def column(self, key: str) -> Series:
        """A logged number over time; empty where it was never logged, NaN where it was not a number."""
        logged = [(step["step"], step[key]) for step in self.steps if step.get(key) is not None]
        pairs_S2 = np.array(logged, dtype=np.float64).reshape(-1, 2)
        return Series(pairs_S2[:, 0], pairs_S2[:, 1])

    def arrays(self, key: str) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
        """(steps [S], one array each) of a logged list, such as a histogram or expert loads."""
        logged = [step for step in self.steps if step.get(key) is not None]
        return np.array([step["step"] for step in logged], dtype=np.float64), [np.array(step[key]) for step in logged]


def model_of(entry: Mapping[str, Any]) -> str:
    """The model an evaluation is about, under the name its metrics and its colour go by."""
    if entry.get("role") == "teacher":
        return "teacher"
    return entry.get("student") or entry["name"]


def title(entry: Mapping[str, Any]) -> str:
    """What people call it: `scout`, `scout int4`."""
    return f"{model_of(entry)} {entry['scheme']}" if entry.get("scheme") else model_of(entry)


def read_run(folder: Path) -> Record:
    """Read what there is. Raises DataError when there is nothing: a mistyped path must not yield an empty report."""
    if not any((folder / name).is_file() for name in FILES):
        raise DataError(f"run folder {folder}: holds none of {', '.join(FILES)}; give the folder of a run")
    problems: list[str] = []
    config_file = folder / "config.yaml"
    config_text = config_file.read_text() if config_file.is_file() else ""
    evaluations = _read_json(folder / "evals.json", problems)
    return Record(
        folder=folder,
        config=_read_yaml(config_text, problems),
        config_text=config_text,
        steps=_read_steps(folder / "metrics.jsonl", problems),
        entries=evaluations.get("entries", []),
        mlflow=_read_json(folder / "mlflow.json", problems),
        facts=_read_json(folder / "run.json", problems),
        problems=problems,
    )


def _read_yaml(text: str, problems: list[str]) -> dict[str, Any]:
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as cause:
        problems.append(f"config.yaml could not be parsed ({' '.join(str(cause).split())[:120]})")
        return {}


def _read_json(file: Path, problems: list[str]) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as cause:
        problems.append(f"{file.name} could not be parsed ({cause})")
        return {}


def _read_steps(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The last word on every step, in order; a killed run may leave half a line, which is counted."""
    if not file.is_file():
        return []
    by_step: dict[int, dict[str, Any]] = {}
    torn = 0
    for line in file.read_text().splitlines():
        try:
            step = json.loads(line)
            by_step[step["step"]] = step
        except (json.JSONDecodeError, KeyError, TypeError):
            torn += 1
    if torn:
        problems.append(f"metrics.jsonl has {torn} unreadable line{'s' if torn > 1 else ''}, left out")
    return [by_step[step] for step in sorted(by_step)]
