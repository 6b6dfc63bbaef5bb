"""kill -9 at random moments, checkpoint writes included: every resume must end in the same weights.

    python benchmarks/kills.py [--kills 20] [--ranks 1]

One uninterrupted run of the smoke herd gives the SHA-256 of the final weights; then a run is started, killed with all
its ranks at a random moment, resumed, killed again, until it was killed that often, and finally left to end.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from herd.run.ranks import free_port

ROOT = Path(__file__).resolve().parents[1]


def start(folder: Path, ranks: int, steps: int) -> subprocess.Popen:
    """Start (or resume) the run in `folder`, in a process group of its own."""
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--master_port", str(free_port())),
        *("--num_accelerators", str(ranks), str(ROOT / "tests" / "launch" / "train_only.py")),
        *("--config", str(ROOT / "configs" / "smoke.yaml"), "--resume", "auto"),
    ]
    sets = [f"run.folder={folder}", "run.name=run", f"run.steps={steps}", "run.checkpoint_every=1"]
    command += [word for item in sets for word in ("--set", item)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = (folder / "log.txt").open("a")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def steps_taken(folder: Path) -> int:
    path = folder / "run" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_midway(folder: Path, ranks: int, steps: int, draw: random.Random) -> dict[str, object]:
    """Start, wait until training goes on, kill at a random moment within the next step or its checkpoint."""
    process, before = start(folder, ranks, steps), steps_taken(folder)
    while steps_taken(folder) <= before and process.poll() is None:
        time.sleep(0.005)
    time.sleep(draw.uniform(0.0, 1.0))
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    half_written = [path.name for path in (folder / "run" / "checkpoints").glob(".step_*")]
    return {"killed": alive, "during_checkpoint": bool(half_written), "steps": steps_taken(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    arguments = parser.parse_args()
    steps, draw = 3 * arguments.kills + 8, random.Random(0)
    with tempfile.TemporaryDirectory() as whole_folder, tempfile.TemporaryDirectory() as cut_folder:
        whole, cut = Path(whole_folder), Path(cut_folder)
        assert start(whole, arguments.ranks, steps).wait() == 0, (whole / "log.txt").read_text()
        kills = []
        while sum(kill["killed"] for kill in kills) < arguments.kills:
            kills.append(kill_midway(cut, arguments.ranks, steps, draw))
            print(f"kill {len(kills)}: {kills[-1]}", flush=True)
            assert kills[-1]["killed"], "the run ended before it was killed often enough"
        assert start(cut, arguments.ranks, steps).wait() == 0, (cut / "log.txt").read_text()
        same = (whole / "run" / "digests.txt").read_text() == (cut / "run" / "digests.txt").read_text()
    during = sum(bool(kill["during_checkpoint"]) for kill in kills)
    print(f"{len(kills)} kills, {during} of them during a checkpoint; final weights identical: {same}")
    result = {"ranks": arguments.ranks, "kills": kills, "identical": same}
    (ROOT / "benchmarks" / "results" / "kills.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
