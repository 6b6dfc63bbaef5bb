"""How good is adding up sensitivities? Every allocation of the expert banks is measured beside what the sums pick.

    python -m benchmarks.bits --model runs/bits/students/scout          (--dry-run: how many passes that is)

Groups that are no expert bank keep one choice. Search on calibration rows, differences on held-out rows.
Writes results/bits.json.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from evals.data import data_of
from evals.heldout import rows_from
from evals.intervals import bootstrap_ratio, group_rows
from sweeps.bits import knapsack
from sweeps.bits.meter import Meter
from sweeps.bits.problem import Problem, make_problem

RESULT = Path(__file__).parent / "results" / "bits.json"


def measure(options: argparse.Namespace, problem: Problem) -> dict[str, Any]:
    """Sensitivities of the banks, the KL of every combination, and what the sums would have picked at every size."""
    banks = [group for group in problem.groups if group.experts > 1]
    rest = problem.uniform(options.rest)
    data = data_of(options.model)
    meter = Meter(problem, rows_from(data, options.model, rows=options.rows, part="calibration"))
    plain = problem.uniform("bf16")
    loss_GC = np.array(
        [[meter.measure(plain | {bank.name: label}).mean for label in options.choices] for bank in banks]
    )
    cost_GC = np.array([[bank.bytes[label] for label in options.choices] for bank in banks])
    found = {}
    for picks in product(range(len(options.choices)), repeat=len(banks)):
        found[picks] = meter.measure(_allocation(rest, banks, options, picks)).mean
        print(picks, f"{found[picks]:.6f}", flush=True)
    added = {picks: sum(loss_GC[at, pick] for at, pick in enumerate(picks)) for picks in found}
    size = {picks: sum(int(cost_GC[at, pick]) for at, pick in enumerate(picks)) for picks in found}
    rungs = []
    for solution in knapsack.front(loss_GC, cost_GC):
        best = min((picks for picks in found if size[picks] <= size[solution.picks]), key=found.__getitem__)
        rungs.append({"dp": solution.picks, "best": best, "ratio": found[solution.picks] / found[best]})
    held_out = rows_from(data, options.model, rows=options.check_rows)
    judge = Meter(problem, held_out, model=meter.model)
    documents = group_rows(held_out.documents_N)
    known = {}
    for rung in rungs:
        for picks in (rung["dp"], rung["best"]):
            if picks not in known:
                known[picks] = judge.measure(_allocation(rest, banks, options, picks))
        dp, best = known[rung["dp"]], known[rung["best"]]
        tokens_G = documents.sum(dp.tokens_N)
        allocation = _allocation(rest, banks, options, rung["dp"])
        rung |= {
            "bits": problem.bits_of(allocation),
            "dp_kl": dp.mean,
            "best_kl": best.mean,
            "difference": dp.mean - best.mean,
            "interval": bootstrap_ratio(documents.sum(dp.kl_N - best.kl_N), tokens_G),
        }
    order = list(found)
    return {
        "combinations": len(found),
        "rank_correlation": float(spearmanr([added[p] for p in order], [found[p] for p in order]).statistic),
        "rungs": rungs,
        "kl": [[list(picks), found[picks], added[picks]] for picks in order],
    }


def _allocation(rest: dict[str, str], banks: list, options: argparse.Namespace, picks: tuple[int, ...]) -> dict:
    return rest | {bank.name: options.choices[pick] for bank, pick in zip(banks, picks, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--choices", nargs="+", default=["int4-g128", "int4-g32", "int8"])
    parser.add_argument("--rest", default="int8", help="choice of all other groups")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--check-rows", type=int, default=32)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    problem = make_problem(options.model, [*dict.fromkeys([*options.choices, options.rest, "bf16"])])
    banks = sum(group.experts > 1 for group in problem.groups)
    print(f"{banks} banks, {len(options.choices) ** banks} combinations, {options.rows} rows")
    if options.dry_run:
        return
    result = measure(options, problem)
    settings = {name: str(value) for name, value in vars(options).items()}
    RESULT.write_text(json.dumps({"settings": settings} | result, indent=1) + "\n")
    print(f"rank correlation of added and measured KL: {result['rank_correlation']:.3f}")
    print("| bits | dp / best, searched | dp, held out | best, held out | difference [95 %] |\n|---|---|---|---|---|")
    for rung in result["rungs"]:
        low, high = rung["interval"]
        shown = "the same" if rung["dp"] == rung["best"] else f"{rung['difference']:+.6f} [{low:+.6f}, {high:+.6f}]"
        print(f"| {rung['bits']:.3f} | {rung['ratio']:.2f} | {rung['dp_kl']:.6f} | {rung['best_kl']:.6f} | {shown} |")


if __name__ == "__main__":
    main()
