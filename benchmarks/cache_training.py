"""Tokens/s of a student taught by a cache against the same student on labels alone: real steps of the trainer.

    OMP_NUM_THREADS=1 python benchmarks/cache_training.py [--rounds 15] [--teacher-steps 20] [--micro-rows 8 2]

A nano Behemoth trains, then writes the targets of the rows through; from then on a step of either run is taken in turn,
in one process, on the same rows, in wall seconds and in CPU seconds of all its threads. Target: >= 0.90 of labels.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from distill import run_record
from distill.assembly import Assembly, assemble
from herd.run import ranks
from herd.run.config import load
from herd.run.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cache_training.json"
WARM_UP = 2  # steps that are not counted: they allocate


def build(mode: str, scratch: Path, *sets: str) -> Assembly:
    """The Scout of configs/nano.yaml in this teacher mode."""
    settings = [f"teacher.mode={mode}", f"run.folder={scratch}", "loss.weighting={kind: constant, alpha: 0.5}", *sets]
    if mode != "codistill":
        settings += ["teacher.head_start=0", "teacher.lr=null"]
    config = load(ROOT / "configs" / "nano.yaml", settings)
    config = config.model_copy(update={"students": {"scout": config.students["scout"]}})
    if not (scratch / run_record.FILE).exists():  # whose id names the teacher in the cache
        run_record.begin(scratch, "python benchmarks/cache_training.py")
    return assemble(config, scratch)


def take_step(parts: Assembly, step: int) -> tuple[float, float]:
    """Wall and CPU seconds of one optimiser step on the rows of this step."""
    wall, cpu = time.perf_counter(), time.process_time()
    rows = parts.herd.config.batch.rows
    batches = parts.rows.take(step, rows=rows, micro_rows=parts.micro_rows, rank=0, world=1)
    parts.herd.take_step(batches, step)
    return time.perf_counter() - wall, time.process_time() - cpu


def write_cache(path: Path, scratch: Path, *, teacher_steps: int, steps: int) -> Assembly:
    """The herd that wrote targets of the rows of `steps` steps, after its teacher had trained for `teacher_steps`."""
    parts = build("codistill", scratch, f"teacher.head_start={teacher_steps}", f"teacher.cache={{path: {path}}}")
    for step in range(teacher_steps + steps):
        take_step(parts, step)
    parts.herd.close()
    return parts


def compare(path: Path, scratch: Path, micro_rows: int, first: int, rounds: int) -> dict[str, Any]:
    """Seconds of both kinds of step, one after the other, and their ratios."""
    split = f"batch.micro_rows={micro_rows}"
    runs = {
        "labels": build("none", scratch, split),
        "cached": build("cached", scratch, split, f"teacher.cache={{path: {path}}}"),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(WARM_UP + rounds):
        order = list(runs) if number % 2 else list(runs)[::-1]
        for name in order:
            took = take_step(runs[name], first + number)
            if number >= WARM_UP:
                seconds[name].append(took)
    runs["cached"].herd.close()
    config = runs["cached"].herd.config
    row: dict[str, Any] = {"micro_rows": micro_rows, "tokens_a_step": config.batch.rows * config.data.sequence_length}
    for place, clock in enumerate(("wall", "cpu")):
        labels, cached = ([took[place] for took in seconds[name]] for name in runs)
        ratios = [alone / read for alone, read in zip(labels, cached, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        row[clock] = {
            "labels_s": labels,
            "cached_s": cached,
            "ratio": statistics.median(labels) / statistics.median(cached),
            "pairs": {"median": statistics.median(ratios), "quartiles": [low, high]},
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--teacher-steps", type=int, default=20, help="before the teacher's targets are kept")
    parser.add_argument("--micro-rows", type=int, nargs="+", default=[8, 2], help="of the 8 rows of a step")
    arguments = parser.parse_args()
    ranks.initialise()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        path, first = Path(scratch) / "cache", arguments.teacher_steps
        steps = WARM_UP + arguments.rounds
        write_cache(path, Path(scratch), teacher_steps=first, steps=steps)
        for micro_rows in arguments.micro_rows:
            row = compare(path, Path(scratch), micro_rows, first, arguments.rounds)
            rows.append(row)
            for clock in ("wall", "cpu"):
                found, tokens = row[clock], row["tokens_a_step"]
                labels, cached = (tokens / statistics.median(found[name]) for name in ("labels_s", "cached_s"))
                low, high = found["pairs"]["quartiles"]
                print(
                    f"{micro_rows} rows a micro-batch, {clock:4}: labels {labels:,.0f} tokens/s, cached {cached:,.0f}; "
                    f"ratio {found['ratio']:.3f}, of pairs {found['pairs']['median']:.3f} [{low:.3f}, {high:.3f}]",
                    flush=True,
                )
    write_atomic(RESULTS, json.dumps({"rounds": arguments.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
