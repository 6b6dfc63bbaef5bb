"""Training throughput of the nano herd on one and on two ranks, one thread each, through the real launcher.

    python benchmarks/throughput.py [--rounds 3] [--steps 12] [--rows 8 16 32]

Runs alternate; of each the median tokens/s over its steps counts. Gradients cross between ranks once a step whatever
its size, so the ratio is given for several numbers of rows a step. Target: two ranks >= 1.5x of one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from herd.run.ranks import free_port

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "throughput.json"
WARM_UP = 3  # steps that are not counted: they compile kernels and allocate


def run(num_ranks: int, rows: int, steps: int) -> list[dict]:
    """Metrics of the counted steps of one training run, without what follows training."""
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--master_port", str(free_port())),
        *("--num_accelerators", str(num_ranks), str(ROOT / "tests" / "launch" / "train_only.py")),
        *("--config", str(ROOT / "configs" / "nano.yaml")),
    ]
    steps += WARM_UP
    with tempfile.TemporaryDirectory() as folder:
        sets = [f"run.folder={folder}", "run.name=run", f"run.steps={steps}", f"run.checkpoint_every={steps}"]
        sets += ["run.evaluate_every=0", "teacher.head_start=0", f"batch.rows={rows}"]
        command += [word for item in sets for word in ("--set", item)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][WARM_UP:]


def parts_of(records: list[dict]) -> dict[str, float]:
    """Median seconds of each part of a step."""
    keys = [key for key in records[0] if key.startswith("time/")]
    return {key.removeprefix("time/"): statistics.median(record[key] for record in records) for key in keys}


def compare(rows: int, rounds: int, steps: int) -> dict[str, Any]:
    """One rank and two in turn: tokens/s, their ratios, and the parts of a step on either."""
    speeds: dict[int, list[float]] = {1: [], 2: []}
    parts: dict[int, dict[str, float]] = {}
    for _ in range(rounds):
        for num_ranks in speeds:
            records = run(num_ranks, rows, steps)
            speeds[num_ranks].append(statistics.median(record["tokens_per_s"] for record in records))
            parts[num_ranks] = parts_of(records)
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    return {"rows": rows, "tokens_per_s": speeds, "ratios": ratios, "parts_s": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32], help="rows a step, over all ranks")
    arguments = parser.parse_args()
    cases = []
    for rows in arguments.rows:
        case = compare(rows, arguments.rounds, arguments.steps)
        cases.append(case)
        one, two = (statistics.median(case["tokens_per_s"][ranks]) for ranks in (1, 2))
        ratios = case["ratios"]
        print(
            f"{rows:3} rows a step: 1 rank {one:,.0f} tokens/s, 2 ranks {two:,.0f}; "
            f"ratio {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
            flush=True,
        )
        for ranks, parts in case["parts_s"].items():
            print(f"    {ranks} rank: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in parts.items()))
    RESULTS.write_text(json.dumps({"rounds": arguments.rounds, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
