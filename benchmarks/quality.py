"""Does the herd beat its control? The same student, seeds and batches with a good, an immature and no teacher.

    python benchmarks/quality.py [--seeds 3] [--workers 2] [--steps 400]

Each run is a real `python -m distill` in runs/quality/; finished ones are not run again. Prints paired differences
with 95 % intervals over seeds and writes benchmarks/results/quality.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scipy.stats import t as student_t

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "quality"
TEACHER = "behemoth-1000"
GOOD = ["teacher.mode=frozen", f"teacher.source={RUNS / TEACHER / 'students' / 'behemoth'}"]
CASES = {
    "alone": ["teacher.mode=none"],
    "good teacher": GOOD,
    "immature teacher": ["teacher.mode=codistill"],
    "good teacher, constant 0.9": [*GOOD, "loss.weighting={kind: constant, alpha: 0.9}"],
}


def distill(config: str, name: str, settings: list[str]) -> dict[str, float]:
    """Run once, unless it was; returns the last held-out losses by model."""
    folder = RUNS / name
    if not (folder / "evals.json").exists():
        sets = [f"run.folder={RUNS}", f"run.name={name}", *settings]
        command = [sys.executable, "-m", "distill", "--config", config, "--resume", "auto"]
        command += [word for item in sets for word in ("--set", item)]
        with (RUNS / f"{name}.log").open("a") as log:
            subprocess.run(
                command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=log, stderr=log
            )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if any(key.startswith("heldout/") for key in line))
    losses = {key.removeprefix("heldout/"): value for key, value in last.items() if key.startswith("heldout/")}
    alphas = [line["student/scout/alpha"] for line in lines if "student/scout/alpha" in line]
    return losses | ({"alpha": statistics.mean(alphas)} if alphas else {})


def interval(differences: list[float]) -> tuple[float, float]:
    """95 % Student interval of the mean of paired differences."""
    if len(differences) < 2:
        return (float("nan"), float("nan"))
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    half = student_t.ppf(0.975, len(differences) - 1) * spread / len(differences) ** 0.5
    return (mean - half, mean + half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    teacher = distill("configs/experiments/teacher.yaml", TEACHER, [])["behemoth"]
    jobs = [(case, seed) for seed in range(arguments.seeds) for case in CASES]

    def run(job: tuple[str, int]) -> dict[str, float]:
        case, seed = job
        name = f"{case.replace(', ', '-').replace(' ', '-')}-{seed}"
        settings = [f"run.seed={seed}", f"run.steps={arguments.steps}", f"run.checkpoint_every={arguments.steps}"]
        return distill("configs/experiments/student.yaml", name, settings + CASES[case])

    with ThreadPoolExecutor(arguments.workers) as pool:
        results = dict(zip(jobs, pool.map(run, jobs), strict=True))
    report(results, teacher, arguments.seeds)


def report(results: dict[tuple[str, int], dict[str, float]], teacher: float, seeds: int) -> None:
    """Print and write the table: held-out nats, difference to alone, share of the gap to the good teacher closed."""
    rows = []
    alone = [results["alone", seed]["scout"] for seed in range(seeds)]
    for case in CASES:
        losses = [results[case, seed]["scout"] for seed in range(seeds)]
        differences = [loss - control for loss, control in zip(losses, alone, strict=True)]
        closed = [(control - loss) / (control - teacher) for loss, control in zip(losses, alone, strict=True)]
        row = {
            "case": case,
            "heldout_nats": losses,
            "mean": statistics.mean(losses),
            "difference_to_alone": statistics.mean(differences),
            "difference_ci95": interval(differences),
            "gap_closed": statistics.mean(closed),
            "mean_alpha": [results[case, seed].get("alpha", 0.0) for seed in range(seeds)],
            "teacher_nats": [results[case, seed].get("teacher") for seed in range(seeds)],
        }
        rows.append(row)
        low, high = row["difference_ci95"]
        print(
            f"{case:28} {row['mean']:.4f} nats   to alone {row['difference_to_alone']:+.4f} [{low:+.4f}, {high:+.4f}]"
            f"   gap closed {row['gap_closed']:.0%}   mean alpha {statistics.mean(row['mean_alpha']):.2f}"
        )
    print(f"{'the good teacher itself':28} {teacher:.4f} nats; {seeds} seeds, intervals over seeds, paired")
    target = ROOT / "benchmarks" / "results" / "quality.json"
    target.write_text(json.dumps({"teacher_nats": teacher, "seeds": seeds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
