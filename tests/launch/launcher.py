"""Starts real runs for the tests of this folder: the deepspeed launcher, its ranks, their exit code and files.

result = launch(tmp_path, ranks=2, overrides=["run.steps=4"]); result.code, result.log, result.metrics()
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from herd.run.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a group this process made
TRAIN_ONLY = Path(__file__).with_name("train_only.py")


@dataclass
class Launched:
    """A finished run."""

    code: int
    log: str
    folder: Path

    def metrics(self) -> list[dict]:
        """Its metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def curve(self, key: str) -> list[float]:
        """One metric, step after step."""
        return [record[key] for record in self.metrics() if key in record]


def command(tmp_path: Path, *, ranks: int, overrides: list[str], resume: str, train_only: bool) -> list[str]:
    sets = [f"run.folder={tmp_path}", "run.name=run", *overrides]
    program = [str(TRAIN_ONLY)] if train_only else ["--module", "distill"]
    launcher = ["-m", "deepspeed.launcher.runner", "--quiet", "--master_port", str(free_port())]
    return [
        *(sys.executable, *launcher, "--num_accelerators", str(ranks), *program),
        *("--config", str(SMOKE), "--resume", resume),
        *(word for item in sets for word in ("--set", item)),
    ]


def start(
    tmp_path: Path,
    *,
    ranks: int = 2,
    overrides: list[str] | None = None,
    resume: str = "never",
    train_only: bool = True,
) -> subprocess.Popen:
    """Start a run of the smoke herd in tmp_path/run; `train_only` leaves out what follows training."""
    outside = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment = outside | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }
    return subprocess.Popen(
        command(tmp_path, ranks=ranks, overrides=overrides or [], resume=resume, train_only=train_only),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, tmp_path: Path) -> Launched:
    """Wait for a run to end; nothing of it is left running."""
    try:
        log, _ = process.communicate(timeout=600)
    finally:
        kill_group(process)
    return Launched(process.returncode, log, tmp_path / "run")


def launch(tmp_path: Path, **settings) -> Launched:
    """Start a run and wait for its end."""
    return finish(start(tmp_path, **settings), tmp_path)


def kill_group(process: subprocess.Popen) -> None:
    """kill -9 the launcher and every rank."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def wait_for_step(process: subprocess.Popen, tmp_path: Path, step: int) -> None:
    """Return as soon as this step's metrics are written."""
    path = tmp_path / "run" / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def rank_processes(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks, in their order."""
    import psutil

    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if any(word.startswith("--local_rank=") for word in child.cmdline())]
    return [child.pid for child in sorted(ranks, key=lambda child: child.cmdline())]
