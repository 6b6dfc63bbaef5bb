"""Starts real runs for the tests of this folder: the deepspeed launcher, its ranks, their exit code and files.

result = launch(tmp_path, ranks=2, overrides=["run.steps=4"]); result.code, result.log, result.metrics()
many = train(tmp_path, {"one": ["run.steps=4"], "two": []}, ranks=2, overrides=[])       # without the launcher
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
SHORT = ["run.steps=5", "teacher.head_start=1", "run.evaluate_every=0", "run.checkpoint_every=3"]
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


def start(
    tmp_path: Path,
    *,
    ranks: int = 2,
    overrides: list[str] | None = None,
    resume: str = "never",
    train_only: bool = True,
) -> subprocess.Popen:
    """Start a run of the smoke herd in tmp_path/run; `train_only` leaves out what follows training."""
    launcher = ["-m", "deepspeed.launcher.runner", "--quiet", "--master_port", str(free_port())]
    program = [str(TRAIN_ONLY)] if train_only else ["--module", "distill"]
    words = [*launcher, "--num_accelerators", str(ranks), *program, *settings(tmp_path, overrides, resume)]
    return spawn(tmp_path, words, subprocess.PIPE)


def start_ranks(
    tmp_path: Path, program: list[str], *, ranks: int, overrides: list[str], resume: str
) -> list[subprocess.Popen]:
    """Start a program on ranks of a group without a launcher, which costs as much as a rank; logs are rank<n>.log."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    words, found = [*program, *settings(tmp_path, overrides, resume)], []
    tmp_path.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        with (tmp_path / f"rank{rank}.log").open("w") as log:
            own = group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(ranks)}
            found.append(spawn(tmp_path, words, log, **own))
    return found


def settings(tmp_path: Path, overrides: list[str] | None, resume: str) -> list[str]:
    """Words of a run's command line."""
    sets = [f"run.folder={tmp_path}", "run.name=run", *(overrides or [])]
    return ["--config", str(SMOKE), "--resume", resume, *(word for item in sets for word in ("--set", item))]


def spawn(tmp_path: Path, words: list[str], out, **variables: str) -> subprocess.Popen:
    """Python with these words, in a session of its own, outside any group that this process made."""
    outside = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment = outside | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment | variables,
        stdout=out,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train(
    tmp_path: Path, runs: dict[str, list[str]], *, ranks: int, overrides: list[str], resume: str = "never"
) -> dict[str, Launched]:
    """Train each run in tmp_path/<name> with overrides of its own, one after another on the same ranks, no launcher.

    The first is in a process as new as any; a state that it leaves behind changes the others, and their tests fail.
    """
    program = [str(TRAIN_ONLY), "--runs", json.dumps(runs)]
    finish_ranks(start_ranks(tmp_path, program, ranks=ranks, overrides=overrides, resume=resume), tmp_path)
    return {name: Launched(0, logs(tmp_path), tmp_path / name) for name in runs}


def finish_ranks(processes: list[subprocess.Popen], tmp_path: Path) -> Launched:
    """Wait for ranks that must all end well."""
    try:
        codes = [process.wait(600) for process in processes]
    finally:
        for process in processes:
            kill_group(process)
    assert not any(codes), logs(tmp_path)
    return Launched(0, logs(tmp_path), tmp_path / "run")


def logs(tmp_path: Path) -> str:
    """What all ranks said."""
    return "".join(path.read_text() for path in sorted(tmp_path.glob("rank*.log")))


def finish(process: subprocess.Popen, tmp_path: Path) -> Launched:
    """Wait for a run to end; nothing of it is left running."""
    try:
        log, _ = process.communicate(timeout=600)
    finally:
        kill_group(process)
    return Launched(process.returncode, log, tmp_path / "run")


def launch(tmp_path: Path, **options) -> Launched:
    """Start a run and wait for its end."""
    return finish(start(tmp_path, **options), tmp_path)


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
        assert process.poll() is None, process.communicate()[0] or logs(tmp_path)
        time.sleep(0.02)


def rank_processes(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks, in their order."""
    import psutil

    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if any(word.startswith("--local_rank=") for word in child.cmdline())]
    return [child.pid for child in sorted(ranks, key=lambda child: child.cmdline())]
