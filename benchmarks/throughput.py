"""Training throughput of the nano herd on one and on two ranks, one thread each, through the real launcher.

    python benchmarks/throughput.py [--rounds 3] [--steps 12]

Runs alternate; of each the median tokens/s over its steps counts. Target: two ranks >= 1.5x of one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from herd.run.ranks import free_port

ROOT = Path(__file__).resolve().parents[1]


def run(num_ranks: int, steps: int, folder: Path) -> list[dict]:
    """Metrics of one training run, without what follows training."""
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--master_port", str(free_port())),
        *("--num_accelerators", str(num_ranks), str(ROOT / "tests" / "launch" / "train_only.py")),
        *("--config", str(ROOT / "configs" / "nano.yaml")),
    ]
    sets = [f"run.folder={folder}", "run.name=run", f"run.steps={steps}", "teacher.head_start=0"]
    sets += ["run.evaluate_every=0", f"run.checkpoint_every={steps}"]
    command += [word for item in sets for word in ("--set", item)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    speeds: dict[int, list[float]] = {1: [], 2: []}
    parts: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for num_ranks in speeds:
            with tempfile.TemporaryDirectory() as folder:
                records = run(num_ranks, arguments.steps, Path(folder))[2:]
            speeds[num_ranks].append(statistics.median(record["tokens_per_s"] for record in records))
            if num_ranks == 1:
                keys = [key for key in records[0] if key.startswith("time/")]
                parts = {key: statistics.median(record[key] for record in records) for key in keys}
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    print(
        f"1 rank  {statistics.median(speeds[1]):,.0f} tokens/s   2 ranks {statistics.median(speeds[2]):,.0f} tokens/s"
    )
    print(f"2 ranks / 1 rank: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    for key, value in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"  {key.removeprefix('time/'):16} {value:.3f} s of a step on one rank")
    target = ROOT / "benchmarks" / "results" / "throughput.json"
    target.write_text(json.dumps({"tokens_per_s": speeds, "ratios": ratios, "seconds": parts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
