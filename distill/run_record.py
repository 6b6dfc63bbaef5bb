"""run.json in a run's folder: its id, commands, code and versions, and when it started, trained and finished.

begin(folder, command)            a resumed run adds its command
mark(folder, "trained")           the moment, UTC, ISO 8601
"""

import datetime
import json
import platform
import secrets
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from herd.run import files, ranks
from herd.run.lineage import git_commit

FILE = "run.json"
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "mlflow", "compressed-tensors")


def begin(folder: Path, command: str) -> None:
    """Note a start or a resume; a run that goes on is no longer finished."""
    path = folder / FILE
    record = json.loads(path.read_text()) if path.exists() else {"commands": []}
    record["commands"].append(command)
    record.setdefault("id", f"{folder.name}-{secrets.token_hex(8)}")  # a run begun anew under this name is another
    record.setdefault("started", _now())
    record.pop("finished", None)
    record["git_commit"] = git_commit()
    record["world_size"] = ranks.world_size()
    record["versions"] = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    files.write_atomic(path, json.dumps(record, indent=2) + "\n")


def mark(folder: Path, moment: Literal["trained", "finished"], *, again: bool = True) -> None:
    """Note that the models are trained and written, or that all is done but the report, which shows this.

    `again` False keeps an earlier note: a run that was trained already is not trained once more.
    """
    record = read(folder)
    if again or moment not in record:
        files.write_atomic(folder / FILE, json.dumps(record | {moment: _now()}, indent=2) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """What was noted so far."""
    return json.loads((folder / FILE).read_text())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
