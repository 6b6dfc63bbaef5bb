"""Rows of the peers' table over several models: KL over that of our GPTQ, model by model, and the mean over models.

    python benchmarks/quantisation_models.py --model runs/quality/*/students/* [--only "auto-round g128"]

As the models run and with the same routes (`peers_quant/judge.py`). Brackets: 95 %, over documents for a model, over
models (of log ratios, Student's t) for the mean. Goes on where it was; writes results/quantisation_models.json
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import transformers
from peers_quant.judge import BASELINE
from quality import interval
from quantisation import RESULTS, ROWS, label, measure

from herd.run.files import write_atomic

COLUMNS = {"kl": "as they run", "kl_same_routes": "same routes"}
MEANS = RESULTS.with_name("quantisation_models.json")


def table_of(model: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Row -> what was measured of it on one model, without what the peers' table alone shows."""
    names = {BASELINE, *options.only}
    found = measure(model, [row for row in ROWS if row.name in names], options)["table"]
    kept = ("error", "version", "cpu_seconds")
    return {
        entry["name"]: {key: value for key, value in entry.items() if key in kept or key.startswith("kl")}
        for entry in found
        if entry["name"] in names
    }


def mean_ratio(ratios: list[float]) -> dict[str, Any]:
    """The geometric mean and its 95 % interval over models; one model has no interval."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logs)
    ends = [math.exp(end) for end in interval(logs)] if len(logs) > 1 else None
    return {"models": len(logs), "ratio": math.exp(mean), "ratio_ci95": ends}


def means(tables: dict[str, dict[str, Any]], names: list[str]) -> dict[str, dict[str, Any]]:
    """Row -> column -> mean over the models that have it: a row may have failed, and dense models have no routes."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:
        for column in COLUMNS:
            entries = [table[name] for table in tables.values() if name in table]
            ratios = [entry[f"{column}_ratio"] for entry in entries if f"{column}_ratio" in entry]
            if ratios:
                found[name][column] = mean_ratio(ratios)
    return found


def show(ratio: float, interval: list[float] | None) -> str:
    """A ratio with its interval."""
    return f"x{ratio:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def main() -> int:
    """Run and judge every model, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    known = [row.name for row in ROWS if row.name != BASELINE]
    add("--model", type=Path, nargs="+", required=True, help="trained bf16 folders with a tokenizer")
    add("--only", nargs="+", default=["auto-round g128"], choices=known, metavar="ROW", help="rows (auto-round g128)")
    add("--rows", type=int, default=128, help="held-out rows (128)")
    add("--calibration-rows", type=int, default=64, help="calibration rows (64)")
    add("--repeats", type=int, default=1, help="runs of each worker, for the time (1)")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    tables: dict[str, dict[str, Any]] = {}
    for model in (folder.resolve() for folder in options.model):
        if not model.is_dir():
            sys.exit(f"--model {model}: no such folder")
        table = tables[label(model)] = table_of(model, options)
        for name in options.only:
            for column, words in COLUMNS.items():
                if f"{column}_ratio" in table.get(name, {}):
                    ours, theirs = table[BASELINE][column], table[name][column]
                    ratio = show(table[name][f"{column}_ratio"], table[name][f"{column}_ratio_ci95"])
                    print(f"{label(model)}: {name}, {words}: KL {theirs:.5f}, ours {ours:.5f}, {ratio}", flush=True)
    found = means(tables, options.only)
    for name, columns in found.items():
        for column, mean in columns.items():
            words = f"{name}, {COLUMNS[column]}, {mean['models']} models"
            print(f"{words}: {show(mean['ratio'], mean['ratio_ci95'])}")
    write_atomic(MEANS, json.dumps({"mean": found, "models": tables}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
