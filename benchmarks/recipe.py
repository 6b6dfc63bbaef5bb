"""Is what the proxy study found, carried to the nano herd by the transfer rules, better than the settings set by hand?

    python -m benchmarks.recipe [--seeds 5] [--fit runs/sweeps/transfer/transfer.json] [--set run.steps=100]

Fresh seeds that no trial has seen; both arms read the same rows. Each run is a real `python -m distill` in
runs/quality/; finished ones are not run again. Writes benchmarks/results/recipe.json.
"""

import argparse
import hashlib
import json
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import quality
from herd.run.files import write_atomic
from sweeps import scale, settings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "recipe.json"
STUDY, NANO = "configs/sweeps/proxy.yaml", "configs/nano.yaml"
FIRST_SEED = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--fit", type=Path, help="transfer.json of a transfer check, for its exponents")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of both arms; repeatable")
    parser.add_argument(
        "--study-set", action="append", default=[], metavar="KEY=VALUE", help="of the study; repeatable"
    )
    options = parser.parse_args()
    os.chdir(ROOT)
    quality.RUNS.mkdir(parents=True, exist_ok=True)
    carried = quality.RUNS / "recipe.yaml"
    study = settings.load(STUDY, options.study_set)
    scale.write(study, Path(NANO), carried, fit=options.fit, again=f"python -m sweeps --study {STUDY}")
    what = hashlib.sha256(repr((carried.read_text(), options.set)).encode()).hexdigest()[:8]
    jobs = [(arm, FIRST_SEED + seed) for seed in range(options.seeds) for arm in ("by-hand", "carried")]

    def run(job: tuple[str, int]) -> dict[str, float]:
        arm, seed = job
        config = NANO if arm == "by-hand" else str(carried)
        sets = (f"run.seed={seed}", *quality.OF_THE_HERD, *options.set)
        return quality.distill(config, f"recipe-{what}-{arm}-{seed}", sets)

    with ThreadPoolExecutor(options.workers) as pool:
        losses = dict(zip(jobs, pool.map(run, jobs), strict=True))
    found = {"study": study.name, "settings": options.set, "carried": carried.read_text(), "models": {}}
    for model in sorted(key for key in losses[jobs[0]] if key.startswith("heldout/")):
        arms = {arm: [out[model] for (name, _), out in losses.items() if name == arm] for arm in ("by-hand", "carried")}
        differences = [new - old for new, old in zip(arms["carried"], arms["by-hand"], strict=True)]
        low, high = quality.interval(differences)
        found["models"][model] = arms | {"difference": statistics.mean(differences), "ci95": [low, high]}
        means = "  ".join(f"{arm} {statistics.mean(values):.4f}" for arm, values in arms.items())
        print(f"{model:18} {means}  difference {statistics.mean(differences):+.4f} [{low:+.4f}, {high:+.4f}]")
    write_atomic(RESULTS, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
