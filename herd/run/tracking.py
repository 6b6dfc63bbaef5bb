"""MLflow for a run, without ever waiting for it: calls append to a journal, a worker thread sends.

tracker = open_tracker(folder, experiment="herd", run_name="nano", config=config.model_dump(mode="json"))
student = tracker.nested("scout", "student"); student.metrics({"loss/ce": 4.2}, step); tracker.finish()

python -m herd.run.tracking flush RUN_FOLDER        send what a killed run or an unreachable store left behind
"""

import getpass
import json
import os
import platform
import posixpath
import re
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from herd.run import cli, config_text, launcher
from herd.run.errors import EnvironmentFault
from herd.run.lineage import git_commit, read_lineage
from herd.run.store import check, resolve_uri, shown
from herd.run.tracking_journal import Journal
from herd.run.tracking_record import Record
from herd.run.tracking_sender import Sender, Unreachable
from herd.run.tracking_worker import Worker

MAIN = "main"
KEY_LENGTH = 250  # MLflow's limits, in characters
PARAM_LENGTH = 6000
TAG_LENGTH = 8000

Status = Literal["FINISHED", "FAILED", "KILLED"]
Role = Literal["teacher", "student", "export", "evaluation"]


def open_tracker(
    folder: Path,
    *,
    experiment: str,
    run_name: str,
    uri: str | None = None,
    config: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] = {},
    enabled: bool = True,
) -> "Tracker":
    """Track the run that lives in `folder`, going on with the MLflow run that `<folder>/mlflow.json` remembers.

    Only rank 0 tracks; elsewhere, and when not `enabled`, the Tracker does nothing. `config` becomes flattened params
    and `config.yaml`. Returns in milliseconds: MLflow is imported and its store created by the worker thread.

    Raises ConfigError for a URI that is no store, EnvironmentFault for a SQLite store of another MLflow, DataError
    for a damaged `mlflow.json`: mistakes to mend before training. Nothing is raised afterwards.
    """
    if not enabled or not launcher.is_main():
        return Tracker(None, MAIN)
    uri = resolve_uri(uri)
    check(uri)
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    Record.open(folder, uri, experiment)
    tracker = Tracker(_Session(folder, uri, experiment), MAIN)
    tracker._start(run_name, parent=None, tags=_facts() | dict(tags))
    if config is not None:
        tracker.params(config)
        plain = json.loads(json.dumps(config, default=str))
        tracker._put("text", file="config.yaml", text=config_text.write(plain))
    return tracker


class _Session:
    """What the trackers of one folder share: the journal and the thread that sends it."""

    def __init__(self, folder: Path, uri: str, experiment: str) -> None:
        self.journal = Journal(folder)
        self.sender = Sender(folder, uri, experiment, self.journal)
        self.worker = Worker(self.sender, sample_to=MAIN)
        self.unfinished: dict[str, Tracker] = {}
        self.worker.start()

    def close(self, timeout_s: float) -> None:
        self.worker.stop(timeout_s)
        if self.journal.path.exists():
            print(
                f"warning: MLflow store {shown(self.sender.uri)} has not taken everything; to send the rest: "
                f"python -m herd.run.tracking flush {self.journal.path.parent}",
                file=sys.stderr,
            )
        if not self.worker.is_alive():
            self.journal.close()


class Tracker:
    """One MLflow run. Every call returns at once and raises nothing that MLflow or its store did wrong."""

    def __init__(self, session: _Session | None, key: str) -> None:
        self._session, self._key = session, key

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the store has been reached for the first time."""
        return self._session.sender.record.runs.get(self._key) if self._session else None

    @property
    def uri(self) -> str | None:
        """The store, fit to print; None for a tracker that does nothing."""
        return shown(self._session.sender.uri) if self._session else None

    def nested(self, name: str, role: Role, params: Mapping[str, Any] = {}, tags: Mapping[str, str] = {}) -> "Tracker":
        """A child run; the same name and role in the same folder is the same run again."""
        child = Tracker(self._session, f"{role}/{name}")
        if self._session:
            child._start(name, parent=self._key, tags={"herd.role": role} | _provenance() | dict(tags))
        child.params(params)
        return child

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings, nested ones under dotted names. One that changed on resume becomes a tag `resumed.<name>`."""
        flat = {_key(name): _text(value)[:PARAM_LENGTH] for name, value in _flatten(values)}
        if flat:
            self._put("params", values=flat)

    def metrics(self, values: Mapping[str, Any], step: int, *, once: bool = False) -> None:
        """Log numbers at an optimiser step. What is no number (lists, strings, None) is left out, so that a line of
        metrics.jsonl can be given as it is. once: not if this run has logged a later step so, or this one: a resumed
        run takes steps again, and MLflow would keep both."""
        numbers = {_key(k): float(v) for k, v in values.items() if not isinstance(v, list | tuple | dict | str | None)}
        if numbers:
            self._put("metrics", values=numbers, step=step, once=once)

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; the last value of a tag stays."""
        self._put("tags", values={_key(k): str(v)[:TAG_LENGTH] for k, v in values.items()})

    def dataset(self, name: str, source: str, digest: str, context: str) -> None:
        """Log an input of the run; `context` is train, heldout or calibration. MLflow keeps 36 characters of `digest`
        as the digest, and the whole of it in the profile."""
        self._put("dataset", name=name, source=source, digest=digest, context=context)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Copy a small file, or a folder of them, to the run's artifacts. It is read later: leave it in place."""
        self._put("artifact", path=str(Path(path).absolute()), folder=folder)

    def model(
        self,
        name: str,
        path: Path,
        *,
        role: Role,
        alias: str | None,
        metrics: Mapping[str, float] = {},
        tags: Mapping[str, str] = {},
        made_from: str | None = None,
    ) -> None:
        """Log the model folder `path` by reference (no weights are copied) and register a version under `alias`.

        The folder's lineage.json becomes tags and links to the models it was made from. alias None: not registered.
        made_from: the MLflow run of that model, where it is another herd run's.
        """
        if self._session:
            self._put(
                "model",
                id=uuid.uuid4().hex,
                name=name,
                role=role,
                path=str(Path(path).absolute()),
                alias=alias,
                metrics={_key(k): float(v) for k, v in metrics.items()},
                tags={_key(k): str(v)[:TAG_LENGTH] for k, v in tags.items()},
                lineage=read_lineage(path),
                made_from=made_from,
            )

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until everything logged so far is in MLflow; False when `timeout_s` seconds were not enough."""
        return self._session.worker.flush(timeout_s) if self._session else True

    def finish(self, status: Status = "FINISHED", *, timeout_s: float = 30.0) -> None:
        """End the run. The main run ends its open children too, then sends what is left.

        It gives up when the store has taken nothing for `timeout_s` seconds.
        """
        if self._session is None or self._session.unfinished.pop(self._key, None) is None:
            return
        if self._key == MAIN:
            for child in list(self._session.unfinished.values()):
                child.finish(status)
        self._put("finish", status=status)
        if self._key == MAIN:
            self._session.close(timeout_s)

    def _start(self, name: str, *, parent: str | None, tags: Mapping[str, Any]) -> None:
        if self._session:
            self._session.unfinished[self._key] = self
        self._put("start", name=name, parent=parent, tags={_key(k): str(v)[:TAG_LENGTH] for k, v in tags.items()})

    def _put(self, do: str, **content: Any) -> None:
        if self._session:
            self._session.journal.append({"do": do, "run": self._key, "time": int(time.time() * 1000)} | content)


def _facts() -> dict[str, str]:
    """Tags that say what code runs where."""
    facts = {
        "world_size": launcher.world_size(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "version.python": platform.python_version(),
    }
    for package in ("herd-workbench", "torch", "transformers", "deepspeed"):
        try:
            facts[f"version.{package}"] = version(package)
        except PackageNotFoundError:  # herd run from a bare checkout
            continue
    return {name: str(value) for name, value in facts.items()} | _provenance()


def _provenance() -> dict[str, str]:
    """Tags that MLflow's UI shows as the source of a run."""
    facts = {"mlflow.source.name": sys.argv[0], "mlflow.source.type": "LOCAL"}
    facts |= {"mlflow.source.git.commit": git_commit(), "mlflow.user": _user()}
    return {name: value for name, value in facts.items() if value}


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        pairs += _flatten(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", value)]
    return pairs


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _key(name: str) -> str:
    """`name` as MLflow takes it: word characters, dots, dashes, spaces, colons, and slashes that make a clean path."""
    key = posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name)).lstrip("/.")[:KEY_LENGTH]
    return posixpath.normpath(key).lstrip("/.") or "_"  # the cut may have ended it in a slash, or left nothing


def flush(folder: Path) -> int:
    """Send what is pending in a run folder, here and now; returns the number of events sent.

    Raises DataError for a folder that was never tracked, EnvironmentFault when the store does not answer.
    """
    folder = Path(folder).absolute()
    record = Record.read(folder)
    uri = resolve_uri(record.uri)
    check(uri)
    try:
        return Sender(folder, uri, record.experiment).drain()
    except Unreachable as error:
        raise EnvironmentFault(
            f"MLflow store {shown(uri)}: {error}; everything is kept in {folder}, try again when it is up"
        ) from error


def main() -> int:
    """The command line."""
    parser = cli.parser(
        "herd.run.tracking",
        description="Send MLflow what a killed run or an unreachable store left behind.",
        examples=("python -m herd.run.tracking flush runs/nano",),
        config=False,
    )
    parser.add_argument("command", choices=["flush"], help="send the pending events of a run folder")
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    arguments = parser.parse_args()
    return cli.main_guard(lambda: print(f"{flush(arguments.folder)} events sent"))


if __name__ == "__main__":
    sys.exit(main())
