"""What a study costs beside its trials, and what a second worker and pruning bring.

    python -m benchmarks.studies [--trials 200]

Trials are the stub of tests/sweeps: a run's flags and files, and no training. Overhead: seconds a
trial beyond the bare stub process, same machine, alternating. Writes benchmarks/results/studies.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import sweeps
from herd.run.files import write_atomic
from tests.sweeps import studies

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "studies.json"
BLOCK = 20  # trials between two timings of the bare stub
STEP_S = 0.25  # of a trial that has something to wait for


def bare_stub(folder: Path, number: int) -> float:
    """Seconds of one stub process with a trial's flags and nothing around it."""
    study = studies.make(folder)
    settings = [*study.set, "run.seed=0", f"run.folder={folder}", f"run.name=bare-{number}"]
    words = [word for setting in settings for word in ("--set", setting)]
    started = time.monotonic()
    subprocess.run([*studies.STUB, "--config", str(study.base), *words], check=True, cwd=ROOT)
    return time.monotonic() - started


def overhead(trials: int) -> dict[str, object]:
    """Seconds a trial costs in a study and alone, by blocks of trials of one growing study."""
    in_study, alone = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(trials // BLOCK):
            study = studies.make(Path(folder), budget={"trials": BLOCK * (number + 1)})
            started = time.monotonic()
            result = sweeps.run(study)
            in_study.append((time.monotonic() - started) / BLOCK)
            alone.append(statistics.median(bare_stub(Path(folder), 10 * number + i) for i in range(3)))
        assert len(result.trials) == BLOCK * len(in_study)
    extra = [study - bare for study, bare in zip(in_study, alone, strict=True)]
    return {
        "trials": trials,
        "seconds_a_trial": in_study,
        "bare_seconds": alone,
        "overhead_median": statistics.median(extra),
        "overhead_range": [min(extra), max(extra)],
    }


def seconds_of(trials: int, *, workers: int) -> float:
    """Wall seconds of a study whose trials wait, so that they do not compete for the cores."""
    with tempfile.TemporaryDirectory() as folder:
        study = studies.make(
            Path(folder),
            set=["run.steps=40", "tracking.enabled=false"],
            budget={"trials": trials},
            launch={"program": studies.STUB, "workers": workers},
        )
        started = time.monotonic()
        assert len(sweeps.run(study).trials) == trials
        return time.monotonic() - started


def second_worker(rounds: int, trials: int) -> dict[str, object]:
    """Wall time with one worker over that with two, alternating."""
    os.environ["STUB_SECONDS"] = str(STEP_S)
    pairs = [(seconds_of(trials, workers=1), seconds_of(trials, workers=2)) for _ in range(rounds)]
    del os.environ["STUB_SECONDS"]
    ratios = [one / two for one, two in pairs]
    return {"pairs": pairs, "ratio_median": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="of the overhead study")
    parser.add_argument("--rounds", type=int, default=3, help="of the workers' comparison")
    options = parser.parse_args()
    os.chdir(ROOT)
    found = {"overhead": overhead(options.trials), "second_worker": second_worker(options.rounds, trials=8)}
    write_atomic(RESULTS, json.dumps(found, indent=1) + "\n")
    cost, speed = found["overhead"], found["second_worker"]
    print(f"overhead      {cost['overhead_median']:.2f} s a trial {cost['overhead_range']}, {options.trials} trials")
    print(f"two workers   {speed['ratio_median']:.2f}x one {speed['ratio_range']}")


if __name__ == "__main__":
    main()
