"""The KL of every choice for every group alone, all others in bf16: what the dynamic programme adds up.

table = Sensitivities.open(out / "sensitivities.json", problem, identity)
table.fill(meter, stop);  table.loss_GC()

Every number is written as soon as it is known: the same command goes on where it was stopped.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from herd.run.errors import ConfigError, DataError, first_line
from herd.run.files import write_atomic
from quant.allocations import BF16
from sweeps.bits.meter import Meter
from sweeps.bits.problem import Problem


@dataclass
class Sensitivities:
    problem: Problem
    path: Path
    identity: Mapping[str, Any]
    """What the numbers depend on: model, rows, choices."""
    kl: dict[str, dict[str, float]]
    """Group -> label -> nats a token."""

    @classmethod
    def open(cls, path: Path, problem: Problem, identity: Mapping[str, Any]) -> "Sensitivities":
        """What is known so far; ConfigError when the file belongs to another model, other rows or other choices."""
        known: dict[str, dict[str, float]] = {group.name: {BF16: 0.0} for group in problem.groups}
        if path.is_file():
            try:
                content = json.loads(path.read_text())
                found, measured = content["identity"], content["kl"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}: cannot be read ({first_line(error)}); remove it, or give another --out"
                ) from None
            for key in identity:
                if found.get(key) != identity[key]:
                    raise ConfigError(
                        f"--out {path.parent}: holds a search with {key} = {found.get(key)}, this one has "
                        f"{identity[key]}; give another --out"
                    )
            known = {name: known[name] | measured.get(name, {}) for name in known}
        return cls(problem, path, identity, known)

    def missing(self) -> list[tuple[str, str]]:
        """Group and label of what is still to be measured."""
        return [
            (group.name, label)
            for group in self.problem.groups
            for label in self.problem.labels
            if label not in self.kl[group.name]
        ]

    def fill(self, meter: Meter, check_stop: Callable[[], None]) -> None:
        """Measure what is missing; check_stop may raise between two measurements."""
        plain = self.problem.uniform(BF16)
        for group, label in self.missing():
            check_stop()
            self.kl[group][label] = meter.measure(plain | {group: label}).mean
            write_atomic(self.path, json.dumps({"identity": self.identity, "kl": self.kl}, indent=1) + "\n")

    def loss_GC(self) -> NDArray[np.float64]:
        """Nats a token [groups, choices]."""
        return np.array(
            [[self.kl[group.name][label] for label in self.problem.labels] for group in self.problem.groups]
        )
