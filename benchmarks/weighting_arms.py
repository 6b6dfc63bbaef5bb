"""Who learns in the comparisons of weights: the student alone, a grid of constants, and every design of the product.

    for arm in arms(): design = arm.build(steps=200)          # a distill.weighting.Weighting

What the arms are is the same where the truth is known (benchmarks/weighting.py) and on real text (real_text.py).
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from distill import weighting
from distill.tally import Tally
from herd.run import weighting as settings_of
from herd.run.files import write_atomic

CONSTANTS = tuple(tenths / 10 for tenths in range(1, 10))
TEMPERATURES = (1.0, 2.0)
DYNAMIC: dict[str, dict[str, Any]] = {
    "maturity": {"kind": "maturity"},
    "lead": {"kind": "lead"},
    "linear up": {"kind": "schedule", "start": 0.0, "end": 0.9},
    "linear down": {"kind": "schedule", "start": 0.9, "end": 0.0},
    "confidence": {"kind": "confidence", "measure": "entropy"},
    "gate": {"kind": "gate"},
    "repair": {"kind": "repair"},
    "gap token": {"kind": "gap", "over": "token"},
    "gap step": {"kind": "gap", "over": "step"},
    "gap entropy": {"kind": "gap", "over": "entropy"},
    "norms": {"kind": "gradients", "rule": "norms"},
    "mgda": {"kind": "gradients", "rule": "mgda"},
    "surgery": {"kind": "gradients", "rule": "surgery"},
    "uncertainty": {"kind": "uncertainty"},
    "calibration teacher": {"kind": "calibration", "reference": "teacher"},
    "calibration student": {"kind": "calibration", "reference": "student"},
    "slope": {"kind": "slope"},
}
DYNAMIC_AT_2 = ("maturity", "lead", "gap step")
BEYOND = (0.95, 1.0)
"""Above the grid of constants, whose best is its largest with a good teacher."""


@dataclass(frozen=True)
class Arm:
    """One student: a constant weight at a temperature, or a design of the product."""

    name: str
    weight: float | dict[str, Any]
    temperature: float = 1.0
    codec: str | None = None
    """What a cache keeps of its targets; None for whole distributions."""

    def build(self, *, steps: int) -> weighting.Weighting:
        settings = TypeAdapter(settings_of.Weighting).validate_python(self.weight)
        return weighting.build(settings, steps=steps)


def arms() -> list[Arm]:
    """The student alone, the grid of constants, and every design."""
    grid = [Arm(f"{alpha:g} at {heat:g}", alpha, heat) for heat in TEMPERATURES for alpha in CONSTANTS]
    dynamic = [Arm(name, settings) for name, settings in DYNAMIC.items()]
    heated = [Arm(f"{name} at 2", DYNAMIC[name], 2.0) for name in DYNAMIC_AT_2]
    beyond = [Arm(f"beyond the grid: {alpha:g} at {heat:g}", alpha, heat) for heat in TEMPERATURES for alpha in BEYOND]
    higher = [Arm(f"maturity to 0.95 at {heat:g}", DYNAMIC["maturity"] | {"peak": 0.95}, heat) for heat in TEMPERATURES]
    return [Arm("alone", 0.0), *grid, *dynamic, *heated, *beyond, *higher]


def teach(design: weighting.Weighting, stats_ST: torch.Tensor, step: int) -> float:
    """Show a design the statistics of the step its student took; returns the step's mean alpha."""
    tally = Tally(top_k=1)
    tally.add(stats_ST, torch.ones_like(stats_ST[0], dtype=torch.bool), [])
    stats = tally.step_stats(step)
    design.update(stats)
    return stats.alpha


def fifths(values: list[float]) -> list[float]:
    """Means over each fifth of a run."""
    size = len(values) // 5
    return [round(statistics.mean(values[part * size : (part + 1) * size]), 3) for part in range(5)]


def save(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """One line for each run."""
    parts = {
        name: ",\n".join(f"{json.dumps(key)}: {json.dumps(part)}" for key, part in parts.items())
        for name, parts in results.items()
    }
    text = ",\n".join(f"{json.dumps(name)}: {{\n{text}\n}}" for name, text in parts.items())
    write_atomic(path, f"{{{text}}}\n")
