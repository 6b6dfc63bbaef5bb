"""kill -9 at random moments of an export, its check included: every file must end with the same bytes.

    python benchmarks/export_kills.py --model runs/nano/students/scout [--kills 20] [--methods gptq gptq-gated]

Each method's export is made once undisturbed. Then the same command is killed with all its processes at a random moment
of the time it took, run again, killed again; whenever it gets to its end the export is compared, deleted, begun anew.
Writes results/export_kills.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from herd.run.files import sha256, write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "export_kills.json"
METHODS = ("rtn", "gptq", "gptq-gated")
OWN_TIME = "lineage.json"  # the one file that says when it was written


def start(model: Path, method: str, rows: int, out: Path) -> subprocess.Popen:
    """The command, in a process group of its own."""
    command = [sys.executable, "-m", "quant", "--model", str(model), "--scheme", "int4", "--method", method]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = (out.parent / "log.txt").open("a")
    command += ["--out", str(out), "--no-tracking"]
    if method != "rtn":
        command += ["--calibration-rows", str(rows), "--most-rows", str(rows)]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def digests(out: Path) -> dict[str, str]:
    """sha256 of every file of an export but the one that holds the time."""
    return {path.name: sha256(path) for path in sorted(out.iterdir()) if path.name != OWN_TIME}


def attack(model: Path, method: str, rows: int, kills: int, draw: random.Random) -> dict[str, Any]:
    """One method: how often it was killed, with how many layers done, and whether all its exports were the same."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        out = Path(folder) / "out"
        assert start(model, method, rows, out).wait() == 0, (out.parent / "log.txt").read_text()
        seconds = time.monotonic() - started
        whole = digests(out)
        shutil.rmtree(out)
        killed: list[dict[str, Any]] = []
        finished, same = 0, True
        while len(killed) < kills or finished == 0:
            process = start(model, method, rows, out)
            after = draw.uniform(0, seconds) if len(killed) < kills else None
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                layers = len(list((Path(folder) / f".{out.name}.incomplete" / "layers").glob("layer-*.json")))
                killed.append({"after_s": after, "layers": layers})
                print(f"{method}: kill {len(killed)} after {after:.1f} s, {layers} layers finished", flush=True)
                if not out.exists():
                    continue
            else:
                assert process.returncode == 0, (out.parent / "log.txt").read_text()
            same &= digests(out) == whole  # also of one that was killed between its last step and its end
            finished += 1
            shutil.rmtree(out)
    return {
        "rows": rows,
        "seconds": seconds,
        "kills": killed,
        "exports": finished,
        "files": len(whole),
        "identical": same,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a trained bf16 folder with its lineage")
    parser.add_argument("--kills", type=int, default=20, help="of each method (20)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["gptq", "gptq-gated"], help="(both)")
    parser.add_argument("--rows", type=int, default=64, help="calibration rows (64)")
    options = parser.parse_args()
    draw = random.Random(0)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for method in options.methods:
        results[method] = attack(options.model.resolve(), method, options.rows, options.kills, draw)
    for method, found in results.items():
        print(
            f"{method}: {len(found['kills'])} kills, {found['exports']} exports of {found['files']} files, "
            f"identical: {found['identical']}"
        )
    write_atomic(RESULTS, json.dumps(results, indent=1) + "\n")
    return 0 if all(found["identical"] for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
