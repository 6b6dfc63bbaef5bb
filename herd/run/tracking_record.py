"""What a run folder remembers of MLflow: `mlflow.json`, the ids of its runs and models and how far it was sent.

record = Record.load(folder, uri, experiment)
record.runs["main"]        # MLflow run id; children under "student/scout" and the like
record.save()              # atomic
"""

import json
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from herd.run.errors import DataError
from herd.run.files import write_atomic
from herd.run.store import held, shown

FILE = "mlflow.json"
LOCK = ".mlflow.lock"
"""Held in the run folder by whoever sends its journal."""


@dataclass
class Record:
    """One run folder's MLflow identity. Written by whoever holds the folder's send lock, read by anyone."""

    folder: Path
    uri: str
    experiment: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Names this folder in MLflow before its ids are known: a run made twice by a lost answer is found by it."""
    started: float = field(default_factory=time.time)
    """Unix seconds of the first start."""
    runs: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    """Logged-model id by `<role>/<name in lineage.json>`, the newest of each."""
    steps: dict[str, int] = field(default_factory=dict)
    """Last step of each run of which MLflow has what counts once."""
    journal: str | None = None
    offset: int = 0
    """Bytes of the journal so named that MLflow has."""

    @classmethod
    def open(cls, folder: Path, uri: str, experiment: str) -> "Record":
        """The folder's record as `load` gives it; a new one is written at once, by one process only."""
        if not (folder / FILE).exists():
            with held(folder / LOCK):
                record = cls.load(folder, uri, experiment)
                record.save()
                return record
        return cls.load(folder, uri, experiment)

    @classmethod
    def load(cls, folder: Path, uri: str, experiment: str) -> "Record":
        """The folder's record with `uri` and `experiment` in place of the stored ones, or a new one."""
        if not (folder / FILE).exists():
            return cls(folder, uri, experiment)
        return replace(cls.read(folder), uri=uri, experiment=experiment)

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """The folder's record as stored. Raises DataError when there is none, or none that can be read."""
        path = folder / FILE
        if not path.exists():
            raise DataError(f"{folder}: no {FILE} in it, so nothing was tracked there; give a run's folder, runs/NAME")
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")), folder=folder)
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: damaged ({error}); remove it to start a new MLflow run") from error

    def save(self) -> None:
        """Write `mlflow.json` in one step, without a password the URI may hold."""
        content = asdict(self) | {"uri": shown(self.uri)}
        del content["folder"]
        write_atomic(self.folder / FILE, json.dumps(content, indent=1) + "\n")
