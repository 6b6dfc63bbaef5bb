"""A run in MLflow: what is logged arrives, whatever the store and the process do meanwhile. Real stores throughout."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.run import tracking
from herd.run.lineage import model_card, write_lineage
from herd.run.store import prepare
from herd.run.tracking import _key, flush, open_tracker
from herd.run.tracking_sender import PATIENCE

KILLED = """
import sys, time; from pathlib import Path; from herd.run.tracking import open_tracker
tracker = open_tracker(Path(sys.argv[1]), experiment="killed", run_name="killed", uri=sys.argv[2])
child = tracker.nested("scout", "student", params={"lr": 0.002})
for step in range(200): child.metrics({"loss/ce": 5 - step / 100}, step)
print("logged", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    """A real SQLite store for this file; its tests use an experiment each."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlruns')}/mlflow.db"
    prepare(uri)
    return uri


@pytest.fixture(scope="module")
def client(uri):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _steps(client, run_id: str, key: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run_id, key)]


def _model_folder(folder: Path, **lineage: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    write_lineage(folder, **lineage)
    model_card(folder, {"name": folder.name, "metrics": {"held-out nats": 4.31}})
    return folder


def test_a_herd_run_is_a_tree_with_curves_inputs_and_registered_models_that_lead_back_to_their_makers(
    tmp_path, uri, client
):
    config = {"run": {"name": "nano", "steps": 3}, "students": {"scout": {"quantize": [{"scheme": "int4"}]}}, "x": None}
    tracker = open_tracker(
        tmp_path / "run", experiment="tree", run_name="nano", uri=uri, config=config, tags={"gpu": "none"}
    )
    facts = {"teacher": "behemoth-nano", "data_fingerprint": "d" * 64}
    folders = {
        ("behemoth", "teacher"): _model_folder(tmp_path / "t", role="teacher", name="behemoth"),
        ("scout", "student"): _model_folder(tmp_path / "s", role="student", name="scout", **facts),
        ("scout-int4", "export"): _model_folder(tmp_path / "e", role="export", name="scout-int4", student="scout"),
    }
    tracker.dataset("stdlib", "stdlib", "d" * 64, "train")
    tracker.artifact(tmp_path / "s" / "README.md", "cards")
    tracker.metrics({"tokens_per_s": 1480.0, "experts/teacher/load": [[0.5]], "note": "a", "none": None}, 1)
    children = {}
    for (name, role), folder in folders.items():
        children[name] = tracker.nested(name, role, params={"lr": 2e-3, "long": "x" * 7000})
        for step in range(1, 1501):  # more than one request holds
            children[name].metrics({"loss/ce": 5 - step / 1000}, step)
        children[name].model(f"tree-{name}", folder, role=role, alias="nano", metrics={"heldout": 4.3})
    assert tracker.flush(120)
    tracker.finish()
    assert not (tmp_path / "run" / "mlflow_pending.jsonl").exists()

    parent = client.get_run(tracker.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["students.scout.quantize"] == '[{"scheme": "int4"}]'
    assert parent.data.metrics.keys() - {k for k in parent.data.metrics if k.startswith("system/")} == {"tokens_per_s"}
    assert parent.data.metrics["system/cpu_utilization_percentage"] >= 0.0
    assert parent.data.tags["world_size"] == "1" and parent.data.tags["gpu"] == "none"
    (dataset,) = parent.inputs.dataset_inputs
    assert (dataset.dataset.digest, dataset.tags[0].value) == ("d" * 36, "train")
    assert {f.path for f in client.list_artifacts(tracker.run_id)} == {"config.yaml", "cards"}

    experiment = client.get_experiment_by_name("tree")
    found = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{tracker.run_id}'")
    assert {run.info.run_name: run.data.tags["herd.role"] for run in found} == dict(folders.keys())
    assert {run.info.status for run in found} == {"FINISHED"}
    assert _steps(client, children["scout"].run_id, "loss/ce") == list(range(1, 1501))
    assert len(client.get_run(children["scout"].run_id).data.params["long"]) == 6000

    models = {model.name: model for model in client.search_logged_models([experiment.experiment_id])}
    export = client.get_run(children["scout-int4"].run_id)
    assert [model.model_id for model in export.inputs.model_inputs] == [models["tree-scout"].model_id]
    student = client.get_run(children["scout"].run_id)
    assert [model.model_id for model in student.inputs.model_inputs] == [models["tree-behemoth"].model_id]
    for (name, role), folder in folders.items():
        version = client.get_model_version_by_alias(f"tree-{name}", "nano")
        assert (version.tags["path"], version.tags["role"], version.run_id) == (
            str(folder),
            role,
            children[name].run_id,
        )
        assert json.loads(models[f"tree-{name}"].tags["mlflow.modelVersions"]) == [
            {"name": f"tree-{name}", "version": "1"}
        ]
        assert {metric.key: metric.value for metric in models[f"tree-{name}"].metrics} == {"heldout": 4.3}
        assert str(models[f"tree-{name}"].status) == "READY"
        files = {file.path for file in client.list_logged_model_artifacts(models[f"tree-{name}"].model_id)}
        assert files == {"MLmodel", "README.md", "config.json", "lineage.json"}  # by reference: no weights
    assert client.get_model_version_by_alias("tree-scout", "nano").tags["data_fingerprint"] == "d" * 64


def test_a_resumed_run_is_the_same_run_and_what_changed_is_a_tag(tmp_path, uri, client, monkeypatch):
    def attempt(lr: float, steps: range) -> tuple[str, str]:
        config = {"optim": {"lr": lr}, "steps": 8}
        tracker = open_tracker(tmp_path, experiment="resumed", run_name="r", uri=uri, config=config)
        child = tracker.nested("scout", "student", params={"lr": lr})
        for step in steps:
            child.metrics({"loss": 1.0}, step)
        tracker.finish("KILLED" if steps.start == 0 else "FINISHED", timeout_s=120)
        return tracker.run_id, child.run_id

    first = attempt(2e-3, range(0, 4))
    assert {client.get_run(run).info.status for run in first} == {"KILLED"}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert attempt(3e-3, range(4, 8)) == first
    parent, child = (client.get_run(run) for run in first)
    assert parent.info.status == child.info.status == "FINISHED"
    assert parent.data.params == {"optim.lr": "0.002", "steps": "8"}
    assert {k: v for k, v in parent.data.tags.items() if k.startswith("resumed.")} == {
        "resumed.optim.lr": "0.003",
        "resumed.world_size": "2",
    }
    assert child.data.tags["resumed.lr"] == "0.003"
    assert _steps(client, first[1], "loss") == list(range(8))

    client.delete_run(first[0])  # in the UI, say: the run goes on under a new id
    third = attempt(3e-3, range(8, 9))
    assert third[0] != first[0] and third[1] == first[1]


def test_events_of_a_killed_process_reach_the_store_later(tmp_path, uri, client, monkeypatch):
    nowhere = f"http://127.0.0.1:{_free_port()}"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), nowhere], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"logged\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    command = [sys.executable, "-m", "herd.run.tracking", "flush", str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("\n")) == (3, 1), refused.stderr
    assert "connection refused" in refused.stderr and nowhere in refused.stderr

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert flush(tmp_path) == 203
    assert flush(tmp_path) == 0
    experiment = client.get_experiment_by_name("killed")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"killed", "scout"}
    assert _steps(client, runs["scout"].info.run_id, "loss/ce") == list(range(200))
    assert runs["scout"].data.params == {"lr": "0.002"}
    assert client.get_run(runs["killed"].info.run_id).info.status == "RUNNING"


def test_a_store_that_cannot_be_reached_costs_one_warning_and_takes_everything_when_it_is_back(tmp_path, capsys):
    blocked = tmp_path / "mlruns"
    blocked.write_text("a file where the store's folder should be")
    tracker = open_tracker(tmp_path / "run", experiment="late", run_name="r", uri=f"sqlite:///{blocked}/mlflow.db")
    for step in range(10):
        tracker.metrics({"loss": 1.0}, step)
    assert not tracker.flush(0.1) and not tracker.flush(3)
    assert tracker.run_id is None
    assert len((tmp_path / "run" / "mlflow_pending.jsonl").read_text().splitlines()) >= 11
    blocked.unlink()
    assert tracker.flush(60)
    tracker.finish()
    errors = capsys.readouterr().err
    assert errors.count("warning:") == 1 and "events wait in" in errors and "is back" in errors
    from mlflow.tracking import MlflowClient

    assert _steps(MlflowClient(f"sqlite:///{blocked}/mlflow.db"), tracker.run_id, "loss") == list(range(10))


def _relay(port: int, target: int) -> ThreadingHTTPServer:
    """Pass requests on `port` to the server on `target`, a connection each, until shut down."""

    class Relay(BaseHTTPRequestHandler):
        def relay(self) -> None:
            behind = http.client.HTTPConnection("127.0.0.1", target)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            behind.request(self.command, self.path, body, {"Content-Type": "application/json"})
            answer = behind.getresponse()
            self.send_response(answer.status)
            self.end_headers()
            self.wfile.write(answer.read())
            behind.close()

        do_GET = do_POST = do_PATCH = do_PUT = relay

        def log_message(self, *_: object) -> None:
            pass

    relay = ThreadingHTTPServer(("127.0.0.1", port), Relay)
    threading.Thread(target=relay.serve_forever, args=(0.05,), daemon=True).start()
    return relay


def test_a_server_that_dies_midway_and_returns_misses_nothing_not_even_a_model(tmp_path, uri, client, capsys):
    port, front = _free_port(), _free_port()
    command = [sys.executable, "-m", "herd.run.ui", "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, env=os.environ | {"MLFLOW_TRACKING_URI": uri}, **quiet)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server)
        taken = subprocess.run(command, capture_output=True, text=True)
        assert (taken.returncode, taken.stderr.count("\n")) == (3, 1)
        assert f"--port {port}: address already in use" in taken.stderr

        relay = _relay(front, port)
        tracker = open_tracker(tmp_path / "run", experiment="served", run_name="r", uri=f"http://127.0.0.1:{front}")
        tracker.metrics({"loss": 1.0}, 1)
        assert tracker.flush(60)
        relay.shutdown()
        relay.server_close()
        model = _model_folder(tmp_path / "m", name="served")
        tracker.metrics({"loss": 1.0}, 2)
        tracker.model("served", model, role="student", alias="a", metrics={"l": 1})
        assert not tracker.flush(3)
        relay = _relay(front, port)
        assert tracker.flush(60)
        tracker.finish()
        relay.shutdown()
        relay.server_close()
    finally:
        server.terminate()
        assert server.wait(30) == 0
    with pytest.raises(OSError):  # its workers went with it
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
    assert _steps(client, tracker.run_id, "loss") == [1, 2]
    assert client.get_model_version_by_alias("served", "a").run_id == tracker.run_id
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert capsys.readouterr().err.count("warning:") == 1


def _wait_for(url: str, server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"the server ended with {server.returncode}")


def test_what_the_store_refuses_is_left_out_alone_and_the_rest_arrives(tmp_path, uri, client, capsys):
    tracker = open_tracker(tmp_path / "run", experiment="refused", run_name="r", uri=uri)
    tracker.artifact(tmp_path / "nothing-here")
    tracker.metrics({"loss": float("nan")}, 1)
    tracker.metrics({"loss": 1.0}, 2**70)  # a step no database holds
    tracker.metrics({"loss": 1.0, "odd @/../name": 2.0}, 3)
    # The store answers "internal error" to the one and is well otherwise: after a few attempts that one is left out.
    assert any(tracker.flush(1) for _ in range(PATIENCE + 2))
    tracker.finish()
    assert _steps(client, tracker.run_id, "loss") == [1, 3]
    assert client.get_run(tracker.run_id).data.metrics["name"] == 2.0
    errors = capsys.readouterr().err
    assert "nothing-here is no longer there" in errors
    assert "refuses metrics of run 'main': Python int too large" in errors


def test_a_tracker_of_another_rank_or_switched_off_does_nothing_and_imports_nothing(tmp_path):
    script = """
import os, sys; from pathlib import Path; from herd.run.tracking import open_tracker
for enabled, rank in ((True, "1"), (False, "0")):
    os.environ["RANK"] = rank
    tracker = open_tracker(Path(sys.argv[1]), experiment="e", run_name="r", config={"a": 1}, enabled=enabled)
    child = tracker.nested("scout", "student", params={"lr": 1})
    child.metrics({"loss": 1.0}, 1); child.params({"a": 1}); child.tags({"a": "b"}); child.artifact(Path("x"))
    child.dataset("a", "b", "c", "train"); child.model("m", Path("x"), role="student", alias="a")
    assert child.flush() and child.run_id is None and tracker.uri is None
    child.finish(); tracker.finish()
assert not {"mlflow", "torch", "sqlalchemy"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


def test_the_machine_is_sampled_once_the_run_is_there_and_not_before(tmp_path, uri, client, monkeypatch, capsys):
    def late() -> dict[str, str]:
        time.sleep(2.0)  # the worker has reached the store by then
        return {}

    monkeypatch.setattr(tracking, "_facts", late)
    tracker = open_tracker(tmp_path / "run", experiment="late", run_name="late", uri=uri)
    tracker.finish()
    metrics = client.get_run(tracker.run_id).data.metrics
    assert metrics["system/cpu_utilization_percentage"] >= 0.0
    assert "refuses" not in capsys.readouterr().err


@given(st.text(min_size=1) | st.text("/.a :", min_size=1) | st.text("/.a", min_size=240, max_size=260))
def test_any_name_becomes_one_that_mlflow_takes_and_stays_it(name):
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    key = _key(name)
    _validate_metric_name(key)
    _validate_param_name(key)
    assert _key(key) == key


def test_steps_that_a_resumed_run_takes_again_are_in_mlflow_once(tmp_path, uri, client):
    def steps(numbers):
        tracker = open_tracker(tmp_path / "run", experiment="again", run_name="r", uri=uri)
        for step in numbers:
            tracker.metrics({"loss": float(step)}, step, once=True)
        tracker.metrics({"eval": 1.0}, 3)
        tracker.finish()
        return tracker.run_id

    run = steps(range(6))
    assert run == steps(range(3, 9))
    assert [found.step for found in client.get_metric_history(run, "loss")] == list(range(9))
    assert len(client.get_metric_history(run, "eval")) == 2


def test_steps_taken_again_before_the_store_was_ever_reached_are_in_mlflow_once(tmp_path, uri, client):
    away = f"sqlite:///{tmp_path}/file/mlflow.db"
    (tmp_path / "file").write_text("")
    for numbers in (range(4), range(2, 6)):
        tracker = open_tracker(tmp_path / "run", experiment="again2", run_name="r", uri=away)
        for step in numbers:
            tracker.metrics({"loss": float(step)}, step, once=True)
        tracker.finish(timeout_s=0.1)
    tracker = open_tracker(tmp_path / "run", experiment="again2", run_name="r", uri=uri)
    tracker.finish()
    history = client.get_metric_history(tracker.run_id, "loss")
    assert sorted(found.step for found in history) == list(range(6))
    assert "system/cpu_utilization_percentage" in client.get_run(tracker.run_id).data.metrics
