"""What a training step pays for MLflow: `tracker.metrics()` against a direct, synchronous `log_batch`, interleaved.

    python benchmarks/tracking.py [--steps 60] [--delay-ms 500]

Two stores: local SQLite, and a real MLflow server on loopback behind a proxy that holds every request for the delay.
Prints medians, spread and ratios, checks that everything arrived, writes benchmarks/results/tracking.json.
"""

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from herd.run.tracking import open_tracker

RESULTS = Path(__file__).parent / "results" / "tracking.json"
VALUES = {f"group/metric_{i}": i / 7 for i in range(40)}  # a step of a teacher and two students logs about as many


def free_port() -> int:
    """A port on loopback nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(store: str) -> tuple[subprocess.Popen, int]:
    """An MLflow server over the SQLite `store`, once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "herd.run.ui", "--port", str(port)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": store}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
            return server, port
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the MLflow server ended with {server.returncode}")


def start_slow_proxy(target: int, delay_s: float) -> int:
    """Forward HTTP to the port `target`, `delay_s` late; returns the proxy's port."""

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            time.sleep(delay_s)
            behind = http.client.HTTPConnection("127.0.0.1", target)
            behind.request(self.command, self.path, body, {"Content-Type": "application/json"})
            answer = behind.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            behind.close()

        do_GET = do_POST = do_PUT = do_PATCH = forward

        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    return proxy.server_port


def seconds(action: Callable[[], Any]) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def spread(times: list[float]) -> dict[str, float]:
    """Median, quartiles and worst, in milliseconds."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median": middle * 1e3, "q1": low * 1e3, "q3": high * 1e3, "max": max(times) * 1e3}


def compare(uri: str, folder: Path, steps: int) -> dict[str, Any]:
    """Time both ways of logging `steps` steps to the store at `uri`, turn by turn, and count what arrived."""
    tracker = open_tracker(folder, experiment="benchmark", run_name="tracker", uri=uri)
    if not tracker.flush(120):
        raise SystemExit(f"no store at {uri}")
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    direct = client.create_run(client.get_experiment_by_name("benchmark").experiment_id).info.run_id
    ours, theirs = [], []
    for step in range(steps):
        batch = [Metric(key, value, int(time.time() * 1000), step) for key, value in VALUES.items()]
        theirs.append(seconds(lambda: client.log_batch(direct, metrics=batch, synchronous=True)))  # noqa: B023
        ours.append(seconds(lambda: tracker.metrics(VALUES, step)))  # noqa: B023
    drain = seconds(lambda: tracker.flush(300))
    arrived = len(client.get_metric_history(tracker.run_id, "group/metric_0"))
    tracker.finish()
    return {
        "direct_ms": spread(theirs),
        "tracker_ms": spread(ours),
        "ratio_of_medians": statistics.median(theirs) / statistics.median(ours),
        "ratio_of_worst": max(theirs) / max(ours),
        "steps": steps,
        "arrived": arrived,
        "drain_s": drain,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time a training step spends in tracking.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--delay-ms", type=float, default=500.0)
    arguments = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.TemporaryDirectory(prefix="herd-tracking-") as name:
        store = f"sqlite:///{name}/served/mlflow.db"
        results = {"sqlite": compare(f"sqlite:///{name}/local/mlflow.db", Path(name) / "a", arguments.steps)}
        server, port = start_server(store)
        try:
            slow = f"http://127.0.0.1:{start_slow_proxy(port, arguments.delay_ms / 1e3)}"
            results[f"http +{arguments.delay_ms:.0f} ms"] = compare(slow, Path(name) / "b", arguments.steps)
        finally:
            server.terminate()
            server.wait()
    print(f"{'store':<14}{'direct median [q1 q3] max':>36}{'tracker median [q1 q3] max, ms':>36}{'ratio':>9}  arrived")
    for store, found in results.items():
        cells = [
            "{median:.3f} [{q1:.3f} {q3:.3f}] {max:.3f}".format(**found[way]) for way in ("direct_ms", "tracker_ms")
        ]
        arrived = f"{found['arrived']}/{found['steps']}"
        print(f"{store:<14}{cells[0]:>36}{cells[1]:>36}{found['ratio_of_medians']:>8.0f}x  {arrived}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"command": " ".join(sys.argv), "stores": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
