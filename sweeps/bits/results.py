"""What `python -m sweeps bits` leaves behind: allocations, numbers, a table, a plot, an MLflow run.

text = write(out, outcome, entries);  track(options, outcome, entries, rows, held_out)
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.rows import Rows
from herd.run.files import write_atomic
from herd.run.tracking import open_tracker
from sweeps.bits import knapsack, picture
from sweeps.bits.comparison import Entry, table
from sweeps.bits.problem import Problem
from sweeps.bits.search import Point, front
from sweeps.bits.sensitivities import Sensitivities
from sweeps.bits.solutions import Budgets, costs

PLANNED, SEARCHED = "dp", "search"


@dataclass(frozen=True)
class Outcome:
    model: Path
    problem: Problem
    budgets: Budgets
    table: Sensitivities
    points: list[Point]
    allocations: dict[str, dict[str, str]]
    """The dynamic programme's, the best measured within the budgets, and the uniform ones, by name."""
    kl: dict[tuple[str, ...], float]
    """Choices of all groups -> nats a token, on the rows of the search."""
    against: str
    """The best uniform one within the budgets."""
    ladder: list[dict[str, str]]
    """The dynamic programme's allocations along its fronts, by rising size."""

    def searched_kl(self, name: str) -> float:
        """KL of a named allocation on the rows of the search."""
        return self.kl[tuple(self.allocations[name].values())]


def write(out: Path, outcome: Outcome, entries: list[Entry]) -> str:
    """dp.json and search.json for `python -m quant`, bits.json, bits.md, pareto.png; returns what people read."""
    for name in (PLANNED, SEARCHED):
        write_atomic(out / f"{name}.json", json.dumps(outcome.allocations[name], indent=1) + "\n")
    write_atomic(out / "bits.json", json.dumps(_content(outcome, entries), indent=1) + "\n")
    picture.write(out / "pareto.png", _panels(outcome))
    foretold = outcome.table.foretell(outcome.allocations[PLANNED])
    text = "\n".join([
        table(entries, outcome.against),
        "",
        f"Budget: {outcome.budgets.describe()}. Sizes in bits per weight of the groups; KL on held-out rows.",
        f"On the rows of the search: dp foretold {foretold:.5f}, measured {outcome.searched_kl(PLANNED):.5f}; "
        f"search {outcome.searched_kl(SEARCHED):.5f}, the best within the budget of {len(outcome.points)} allocations.",
        "",
        _ladder(outcome),
        "",
        f"Export one: python -m quant --model {outcome.model} --allocation {out / SEARCHED}.json --out DIR",
    ])  # fmt: skip
    write_atomic(out / "bits.md", f"{text}\n\n![KL against size](pareto.png)\n")
    return text


def track(options: argparse.Namespace, outcome: Outcome, entries: list[Entry], rows: Rows, held_out: Rows) -> None:
    """One MLflow run with the settings, the numbers of the two allocations, and the files."""
    names = ("model", "choices", "bits", "active_bits", "trials", "sampler", "seed", "rows", "check_rows", "around")
    tracker = open_tracker(
        options.out,
        experiment=options.experiment,
        run_name=f"bits-{options.out.resolve().name}",
        config={name: str(value) if isinstance(value := getattr(options, name), Path) else value for name in names},
        tags={"herd.role": "study"},
        enabled=not options.no_tracking,
    )
    for entry in entries:
        name = entry.name.replace("uniform ", "uniform-")
        values = {"kl": entry.kl, "bits": entry.bits, "active_bits": entry.active_bits, "bytes": entry.export_bytes}
        tracker.metrics({f"{name}/{key}": float(value) for key, value in values.items()}, 0)
    tracker.dataset("search rows", rows.source, rows.fingerprint, "calibration")
    tracker.dataset("heldout", held_out.source, held_out.fingerprint, "heldout")
    for file in (f"{PLANNED}.json", f"{SEARCHED}.json", "bits.json", "bits.md", "pareto.png", "sensitivities.json"):
        tracker.artifact(options.out / file, folder="bits")
    tracker.finish()


def _ladder(outcome: Outcome) -> str:
    """How far the sums of the dynamic programme are from what was measured, as a Markdown table."""
    problem, measured = outcome.problem, front(outcome.points, lambda point: point.bytes)
    lines = [
        "| dp's front, bits | foretold | measured | best measured of that size | dp / best |",
        "|---|---|---|---|---|",
    ]
    for allocation in outcome.ladder:
        kl = outcome.kl.get(tuple(allocation.values()))
        if not kl:  # not among the trials, or bf16 everywhere
            continue
        size = problem.bytes_of(allocation)
        # Itself too: it may have been measured without being a trial, in a search of few.
        least = min([kl, *(point.kl for point in measured if point.bytes <= size)])
        foretold = outcome.table.foretell(allocation)
        lines.append(
            f"| {problem.bits_of(allocation):.3f} | {foretold:.5f} | {kl:.5f} | {least:.5f} | {kl / least:.2f} |"
        )
    return "\n".join(lines)


def _content(outcome: Outcome, entries: list[Entry]) -> dict[str, Any]:
    problem = outcome.problem
    return {
        "model": str(outcome.model),
        "budgets": asdict(outcome.budgets),
        "choices": list(problem.labels),
        "around": {outcome.table.around: outcome.table.base},
        "fixed_bytes": problem.fixed_bytes,
        "groups": [
            {
                "name": group.name,
                "weights": group.weights,
                "active_weights": group.active_weights,
                "bytes": {label: group.bytes[label] for label in problem.labels},
                "kl": outcome.table.kl[group.name],
            }
            for group in problem.groups
        ],
        "allocations": {
            name: {
                "choices": allocation,
                "foretold_kl": outcome.table.foretell(allocation),
                "search_kl": outcome.searched_kl(name),
            }
            for name, allocation in outcome.allocations.items()
        },
        "against": outcome.against,
        "held_out": [asdict(entry) for entry in entries],
        "trials": [asdict(point) for point in outcome.points],
    }


def _panels(outcome: Outcome) -> list[picture.Panel]:
    problem, budgets = outcome.problem, outcome.budgets
    total_GC, active_GC = costs(problem)
    return [
        _panel(outcome, "All weights", problem.bits_of, problem.weights, total_GC, budgets.bits),
        _panel(
            outcome,
            "Weights that a token reads",
            problem.active_bits_of,
            problem.active_weights,
            active_GC,
            budgets.active_bits,
        ),
    ]


def _panel(
    outcome: Outcome,
    title: str,
    bits: Callable[[dict[str, str]], float],
    weights: int,
    cost_GC: NDArray[np.int64],
    budget: float | None,
) -> picture.Panel:
    problem = outcome.problem
    uniform = {label: problem.uniform(label) for label in problem.labels}
    best = front(outcome.points, lambda point: bits(point.allocation))
    return picture.Panel(
        title,
        [(bits(point.allocation), point.kl) for point in outcome.points],
        [(bits(point.allocation), point.kl) for point in best],
        {
            label: (bits(allocation), outcome.kl[tuple(allocation.values())])
            for label, allocation in uniform.items()
            if tuple(allocation.values()) in outcome.kl
        },
        [
            (8 * found.costs[0] / weights, outcome.table.base + found.loss)
            for found in knapsack.front(outcome.table.loss_GC(), cost_GC)
        ],
        budget,
    )
