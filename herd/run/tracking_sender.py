"""Applies journalled events to MLflow, in order; with `tracking_models` the only code that talks to a store.

    sent = Sender(folder, uri, experiment).drain()      # everything pending, or Unreachable

An event may be sent twice (a kill between sending and noting it). That is harmless: metrics, params and tags land on
the same rows, inputs on the same digest, runs and models are recognised by their tokens.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from herd.run import store
from herd.run.errors import HerdError
from herd.run.tracking_journal import Journal
from herd.run.tracking_models import log_model
from herd.run.tracking_record import LOCK, Record

Event = dict[str, Any]

# MLflow's own limits per request.
METRICS_A_REQUEST = 1000
PARAMS_A_REQUEST = 100
WINDOW = 2000  # events gathered before something is sent, at most
PATIENCE = 5  # times the store may answer "internal error" to an event, while well otherwise, before it is left out
DIGEST_LENGTH = 36

# The store's trouble, not the event's: keep the event and come back.
OUTAGES = {
    "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED",
    "ABORTED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED",
}  # fmt: skip

# Without it MLflow's UI takes the experiment for one of chat agents, and calls its models agent versions.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

# MLflow retries an unanswered request for minutes by default; the worker has its own back-off, so it should hear soon.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Unreachable(Exception):
    """The store cannot take events now; the message says why."""


class Rejected(Exception):
    """The store will never take this event; the message says why."""


class Sender:
    """Sends the journal of one run folder. `drain` may block on the network: call it off the training thread."""

    def __init__(self, folder: Path, uri: str, experiment: str, journal: Journal | None = None) -> None:
        self.folder, self.uri = folder, uri
        self.journal = journal or Journal(folder)
        self.record = Record.load(folder, uri, experiment)
        self.client: Any = None  # mlflow.tracking.MlflowClient, imported on the first drain
        self.started: set[str] = set()
        """Runs that were started, or set running again, by this sender."""
        self._experiment_id: str | None = None
        self._params: dict[str, dict[str, str]] = {}
        self._well = False
        self._strikes = 0
        self._refused: set[str] = set()

    @property
    def progress(self) -> tuple[bool, int]:
        """Something that changes while a slow store is taking events."""
        return self.client is not None, self.record.offset

    def drain(self) -> int:
        """Send everything pending; returns the number of events sent. Raises Unreachable; what was sent stays sent."""
        if not self._well:
            self._connect()
        self._well = False
        try:
            with store.held(self.folder / LOCK):
                self.record = Record.load(self.folder, self.uri, self.record.experiment)
                sent = self._send_journal()
        except (OSError, HerdError) as error:  # the run folder itself: full, gone, damaged
            raise Unreachable(str(error)) from error
        self._well, self._strikes = True, 0
        return sent

    def _connect(self) -> None:
        """Import MLflow, create the embedded store if that is the one, and see that the store answers."""
        try:
            if self.client is None:
                for name, value in ENVIRONMENT.items():
                    os.environ.setdefault(name, value)
                store.prepare(self.uri)
                self.client = _quiet_client(self.uri)
            else:
                self._strikes += 1
            self.client.search_experiments(max_results=1)
        except HerdError as error:
            raise Unreachable(str(error)) from error
        except Exception as error:  # whatever goes wrong in an arbitrary store must not end a run
            raise Unreachable(_reason(error)) from error

    def _send_journal(self) -> int:
        if (name := self.journal.name()) is None:
            return 0
        begin = end = self.record.offset if self.record.journal == name else 0
        window: list[Event] = []
        sent = 0
        for end, event in self.journal.events(begin):
            if not event:
                continue
            do = event["do"]
            sent += 1
            if do in BATCHED:
                window.append(event)
            if do not in BATCHED or len(window) == WINDOW:
                self._send_window(window)
                window = []
                if do not in BATCHED:
                    self._send_group([event])
                self._acknowledge(name, end)
        self._send_window(window)
        if not self.journal.remove_if_read(end):
            self._acknowledge(name, end)
        else:
            self.record.save()  # its steps
        return sent

    def _acknowledge(self, journal: str, offset: int) -> None:
        self.record.journal, self.record.offset = journal, offset
        self.record.save()

    def _send_window(self, window: list[Event]) -> None:
        """Send params, tags and metrics, one group for each run and kind: their order does not matter."""
        groups: dict[tuple[str, str], list[Event]] = {}
        for event in window:
            groups.setdefault((event["run"], event["do"]), []).append(event)
        for group in groups.values():
            self._send_group(group)

    def _send_group(self, events: list[Event]) -> None:
        """Send events of one run and kind; what the store refuses is narrowed down to one event and left out."""
        do = events[0]["do"]
        try:
            self._guard(lambda: BATCHED[do](self, events) if do in BATCHED else SINGLE[do](self, events[0]))
        except Rejected as error:
            if len(events) == 1:
                return self._refuse(events[0], str(error))
            for event in events:
                self._send_group([event])

    def _guard(self, action: Callable[[], None]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            action()
        except (Rejected, Unreachable):
            raise
        except MlflowException as error:
            hopeless = error.error_code == "INTERNAL_ERROR" and self._strikes >= PATIENCE
            if error.error_code in OUTAGES and not hopeless:
                raise Unreachable(_reason(error)) from error
            raise Rejected(_reason(error)) from error
        except (OSError, HerdError) as error:  # requests' errors are OSErrors; and full disks
            raise Unreachable(_reason(error)) from error
        except Exception as error:  # a fault of MLflow or of ours in one event must not block those behind it
            raise Rejected(_reason(error)) from error

    def _refuse(self, event: Event, reason: str) -> None:
        if reason not in self._refused:
            print(f"warning: MLflow refuses {event['do']} of run {event['run']!r}: {reason}", file=sys.stderr)
        self._refused.add(reason)

    def _run_id(self, event: Event) -> str:
        if event["run"] not in self.record.runs:
            raise Rejected("the run itself could not be started")
        return self.record.runs[event["run"]]

    # What each kind of event does.

    def _start(self, event: Event) -> None:
        """Create the run, or set the remembered one running again. A run that is gone from the store is replaced."""
        known = self._find_run(event["run"])
        if known is None:
            tags = event["tags"] | {"herd.run": self._token(event["run"])}
            if event["parent"]:
                tags["mlflow.parentRunId"] = self._run_id({"run": event["parent"]})
            run = self.client.create_run(
                self._experiment(), start_time=event["time"], tags=tags, run_name=event["name"]
            )
            self.record.runs[event["run"]] = run.info.run_id
        else:
            self.client.update_run(known.info.run_id, status="RUNNING")
            tags = {
                (_resumed(key) if key in known.data.tags else key): value
                for key, value in event["tags"].items()
                if known.data.tags.get(key) != value
            }
            self._log(known.info.run_id, tags=tags)
            self.record.runs[event["run"]] = known.info.run_id
        self.record.save()
        self.started.add(event["run"])

    def _find_run(self, key: str) -> Any:
        """The live MLflow run of `key`: by its id, else by the token that a creation with a lost answer left."""
        from mlflow.exceptions import MlflowException

        if key in self.record.runs:
            try:
                run = self.client.get_run(self.record.runs[key])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                if run.info.lifecycle_stage == "active":
                    return run
            lost = f"MLflow run {self.record.runs.pop(key)} is not in {store.shown(self.uri)} (any more)"
            print(f"warning: {lost}; a new one is started", file=sys.stderr)
        found = self.client.search_runs([self._experiment()], filter_string=f"tags.`herd.run` = '{self._token(key)}'")
        return found[0] if found else None

    def _token(self, key: str) -> str:
        return f"{self.record.token}/{key}"

    def _experiment(self) -> str:
        """Id of the experiment, created or restored when needed."""
        if self._experiment_id is None:
            from mlflow.exceptions import MlflowException

            name, root = self.record.experiment, store.artifact_root(self.uri)
            if (found := self.client.get_experiment_by_name(name)) is None:
                try:
                    location = f"{root}/{quote(name, safe='')}" if root else None
                    self.client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was first
                        raise
                found = self.client.get_experiment_by_name(name)
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            self._experiment_id = found.experiment_id
        return self._experiment_id

    def _finish(self, event: Event) -> None:
        self.client.set_terminated(self._run_id(event), status=event["status"], end_time=event["time"])

    def _metrics(self, events: list[Event]) -> None:
        from mlflow.entities import Metric

        last, new = self.record.steps.get(events[0]["run"], -1), []
        for event in events:
            if not event.get("once") or event["step"] > last:
                new.append(event)
                last = event["step"] if event.get("once") else last
        metrics = (Metric(k, v, e["time"], e["step"]) for e in new for k, v in e["values"].items())
        for some in _batched(metrics, METRICS_A_REQUEST):
            self.client.log_batch(self._run_id(events[0]), metrics=some, synchronous=True)
        self.record.steps[events[0]["run"]] = last

    def _log_params(self, events: list[Event]) -> None:
        """Log params; one that MLflow holds with another value cannot change: it becomes a tag `resumed.<param>`."""
        run_id = self._run_id(events[0])
        if run_id not in self._params:
            self._params[run_id] = dict(self.client.get_run(run_id).data.params)
        known = self._params[run_id]
        values = {k: v for event in events for k, v in event["values"].items()}
        new = {k: v for k, v in values.items() if k not in known}
        self._log(run_id, params=new, tags={_resumed(k): v for k, v in values.items() if known.get(k, v) != v})
        known.update(new)

    def _tags(self, events: list[Event]) -> None:
        self._log(self._run_id(events[0]), tags={k: v for event in events for k, v in event["values"].items()})

    def _log(self, run_id: str, *, params: Mapping[str, str] = {}, tags: Mapping[str, str] = {}) -> None:
        from mlflow.entities import Param, RunTag

        for some in _batched((Param(k, v) for k, v in params.items()), PARAMS_A_REQUEST):
            self.client.log_batch(run_id, params=some, synchronous=True)
        for some in _batched((RunTag(k, v) for k, v in tags.items()), PARAMS_A_REQUEST):
            self.client.log_batch(run_id, tags=some, synchronous=True)

    def _dataset(self, event: Event) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=event["name"],
            digest=event["digest"][:DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": event["source"]}),
            profile=json.dumps({"digest": event["digest"]}),
        )
        context = [InputTag("mlflow.data.context", event["context"])]
        self.client.log_inputs(self._run_id(event), datasets=[DatasetInput(dataset, tags=context)])

    def _artifact(self, event: Event) -> None:
        path = Path(event["path"])
        if path.is_dir():
            self.client.log_artifacts(self._run_id(event), str(path), event["folder"] or path.name)
        elif path.exists():
            self.client.log_artifact(self._run_id(event), str(path), event["folder"] or None)
        else:
            raise Rejected(f"{path} is no longer there")

    def _text(self, event: Event) -> None:
        self.client.log_text(self._run_id(event), event["text"], event["file"])

    def _model(self, event: Event) -> None:
        log_model(self.client, self.record, event, run_id=self._run_id(event), experiment_id=self._experiment())


BATCHED = {"metrics": Sender._metrics, "params": Sender._log_params, "tags": Sender._tags}
SINGLE = {
    "start": Sender._start,
    "finish": Sender._finish,
    "dataset": Sender._dataset,
    "artifact": Sender._artifact,
    "text": Sender._text,
    "model": Sender._model,
}


def _quiet_client(uri: str) -> Any:
    """MLflow's client, for an explicit store and without log lines of its own: what matters we say in one line."""
    import mlflow

    thread = threading.get_ident()
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").addFilter(lambda line: line.thread != thread)
    return mlflow.tracking.MlflowClient(tracking_uri=uri, registry_uri=uri)


def _batched(items: Iterator[Any], size: int) -> Iterator[Sequence[Any]]:
    while some := list(islice(items, size)):
        yield some


def _reason(error: Exception) -> str:
    """The last cause, on one line: MLflow wraps a refused connection in five layers."""
    text = " ".join(str(error).split())
    for cause in ("Connection refused", "timed out", "Name or service not known", "database is locked"):
        if cause.lower() in text.lower():
            return cause.lower()
    return text[:300] or type(error).__name__


def _resumed(name: str) -> str:
    """Tag that holds the value a setting has since a resume, at MLflow's length limit for keys."""
    return f"resumed.{name}"[:250]
