"""Serves MLflow's UI over the store that runs write to, on this machine only.

python -m herd.run.ui [--port 5000]         (what `make ui` runs)
"""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from herd.run import cli
from herd.run.errors import ConfigError, EnvironmentFault
from herd.run.store import artifact_root, prepare, resolve_uri, shown

HOST = "127.0.0.1"


def serve(port: int) -> None:
    """Serve until interrupted.

    Raises ConfigError for a number that is no port; EnvironmentFault when the port is taken, when the store is of
    another MLflow or is itself a server, and when MLflow's server ends by itself.
    """
    if not 0 < port < 65536:
        raise ConfigError(f"--port {port}: a port is a number from 1 to 65535")
    uri = resolve_uri()
    if uri.startswith("http"):
        raise EnvironmentFault(
            f"MLFLOW_TRACKING_URI is a server already: open {shown(uri)}, or unset it for the embedded store"
        )
    _claim(port)
    prepare(uri)
    # Without the parameter MLflow opens its pages for chat agents; it remembers the choice.
    print(f"MLflow over {shown(uri)}: http://{HOST}:{port}/#/experiments?workflowType=machine_learning", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]
    command += ["--backend-store-uri", uri]
    if root := artifact_root(uri):
        command += ["--default-artifact-root", root]
    # No telemetry; no background job runner: nothing here uses it.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # A group of its own, so that its workers end with it whichever way we are stopped.
    server = subprocess.Popen(command, env=os.environ | quiet, start_new_session=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = server.wait()
        raise EnvironmentFault(f"mlflow server ended with exit code {code}; its own words are above")
    except KeyboardInterrupt:
        pass
    finally:
        _end(server)


def _end(server: subprocess.Popen) -> None:
    """End the server's whole group: asked first, killed after 5 s."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # the group is gone
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(5)
            return


def _claim(port: int) -> None:
    """Raise EnvironmentFault when something listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise EnvironmentFault(
                f"--port {port}: {error.strerror.lower()} on {HOST}; give another, e.g. --port {port + 1}"
            ) from error


def main() -> int:
    """The command line."""
    parser = cli.parser(
        "herd.run.ui",
        description="Serve MLflow's UI over the store that runs write to, on this machine only.",
        examples=("python -m herd.run.ui", "python -m herd.run.ui --port 5001"),
        config=False,
    )
    parser.add_argument("--port", type=int, default=5000, help="on 127.0.0.1 (default 5000)")
    arguments = parser.parse_args()
    return cli.main_guard(lambda: serve(arguments.port))


if __name__ == "__main__":
    sys.exit(main())
