"""Does the herd beat its control? The same students, seeds and batches with a good, an immature and no teacher.

    python benchmarks/quality.py [--seeds 3] [--workers 2] [--part student]

Each run is a real `python -m distill` in runs/quality/; finished ones are not run again. Prints differences to the
control, paired by seed, with 95 % intervals over seeds, and writes benchmarks/results/quality.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import t as student_t

from distill import run_record

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "quality"
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
TEACHER = "behemoth-1000"
ONE_STUDENT, HERD = "configs/experiments/student.yaml", "configs/nano.yaml"
GOOD = ("teacher.mode=frozen", f"teacher.source={RUNS / TEACHER / 'students' / 'behemoth'}")
PARTS = {"student": (ONE_STUDENT,), "herd": (HERD,), "all": (ONE_STUDENT, HERD)}
OF_THE_HERD = ("run.ends=trained", "data.heldout_rows=256", "tracking.enabled=false")


@dataclass(frozen=True)
class Case:
    """One row of the table, compared with the case called `control` seed by seed."""

    name: str
    config: str
    control: str
    settings: tuple[str, ...]


CASES = (
    Case("alone", ONE_STUDENT, "alone", ("teacher.mode=none",)),
    Case("good teacher", ONE_STUDENT, "alone", GOOD),
    Case("immature teacher", ONE_STUDENT, "alone", ("teacher.mode=codistill",)),
    # Alpha 0 keeps the teacher and its head start, so that both herds read the same batches.
    Case("herd's control", HERD, "herd's control", (*OF_THE_HERD, "loss.weighting={kind: constant, alpha: 0}")),
    Case("herd", HERD, "herd's control", OF_THE_HERD),
)


def distill(config: str, name: str, settings: tuple[str, ...]) -> dict[str, float]:
    """Run once, unless it was; returns the last held-out loss of every model, and the mean alpha of every student."""
    folder = RUNS / name
    if not (folder / run_record.FILE).exists() or "finished" not in run_record.read(folder):
        sets = [f"run.folder={RUNS}", f"run.name={name}", *settings]
        command = [sys.executable, "-m", "distill", "--config", config, "--resume", "auto"]
        command += [word for item in sets for word in ("--set", item)]
        with (RUNS / f"{name}.log").open("a") as log:
            subprocess.run(
                command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=log, stderr=log
            )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {key: value for line in lines for key, value in line.items() if key.startswith("heldout/")}
    alphas = {key: [line[key] for line in lines if key in line] for key in lines[-1] if key.endswith("/alpha")}
    return losses | {key: statistics.mean(values) for key, values in alphas.items()}


def run_all(cases: list[Case], seeds: int, workers: int) -> dict[tuple[str, int], dict[str, float]]:
    """Every case with every seed, `workers` at a time, one thread each."""

    def run(job: tuple[Case, int]) -> dict[str, float]:
        case, seed = job
        name = "-".join(case.name.replace("'", "").split()) + f"-{seed}"
        return distill(case.config, name, (f"run.seed={seed}", *case.settings))

    jobs = [(case, seed) for seed in range(seeds) for case in cases]
    with ThreadPoolExecutor(workers) as pool:
        return {(case.name, seed): out for (case, seed), out in zip(jobs, pool.map(run, jobs), strict=True)}


def interval(differences: list[float]) -> tuple[float, float]:
    """95 % Student interval of the mean of paired differences."""
    if len(differences) < 2:
        return (float("nan"), float("nan"))
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    half = student_t.ppf(0.975, len(differences) - 1) * spread / len(differences) ** 0.5
    return (mean - half, mean + half)


def compare(
    cases: list[Case], results: dict[tuple[str, int], dict[str, float]], seeds: int, good_teacher: float
) -> Iterator[dict]:
    """One row per case and student: losses, differences to the control, share of the gap to the teacher closed."""
    for case in cases:
        for student in ("scout",) if case.config == ONE_STUDENT else ("scout", "maverick"):
            ours = [results[case.name, seed] for seed in range(seeds)]
            losses = [out[f"heldout/{student}"] for out in ours]
            controls = [results[case.control, seed][f"heldout/{student}"] for seed in range(seeds)]
            # A run without a teacher, or with one that learns from scratch, is measured against the good one.
            measured = case.config == HERD
            teachers = [out["heldout/teacher"] if measured else good_teacher for out in ours]
            differences = [loss - control for loss, control in zip(losses, controls, strict=True)]
            pairs = zip(differences, controls, teachers, strict=True)
            yield {
                "case": case.name,
                "student": student,
                "heldout_nats": losses,
                "mean": statistics.mean(losses),
                "difference": statistics.mean(differences),
                "difference_ci95": interval(differences),
                "worst_difference": max(differences),
                "gap_closed": statistics.mean(d / (teacher - control) for d, control, teacher in pairs),
                "mean_alpha": [out.get(f"student/{student}/alpha", 0.0) for out in ours],
                "teacher_nats": [out.get("heldout/teacher") for out in ours],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--part", choices=PARTS, default="all", help="one student, the nano herd, or both")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.config in PARTS[arguments.part]]
    RUNS.mkdir(parents=True, exist_ok=True)
    good_teacher = distill("configs/experiments/teacher.yaml", TEACHER, ())["heldout/behemoth"]
    results = run_all(cases, arguments.seeds, arguments.workers)
    rows = list(compare(cases, results, arguments.seeds, good_teacher))
    print(
        f"good teacher {good_teacher:.4f} nats; {arguments.seeds} seeds, intervals over seeds, paired with the control"
    )
    for row in rows:
        low, high = row["difference_ci95"]
        print(
            f"{row['case']:27}{row['student']:9} {row['mean']:.4f} nats   to control {row['difference']:+.4f} "
            f"[{low:+.4f}, {high:+.4f}], worst {row['worst_difference']:+.4f}   gap closed {row['gap_closed']:4.0%}   "
            f"mean alpha {statistics.mean(row['mean_alpha']):.2f}"
        )
    result = {"good_teacher_nats": good_teacher, "seeds": arguments.seeds, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
