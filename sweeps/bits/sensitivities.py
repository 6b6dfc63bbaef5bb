"""What every choice for a group alone changes, all other groups at one base choice: what the dynamic programme adds up.

table = Sensitivities.open(out, problem, identity, around="bf16")
table.fill(meter, check_stop);  table.loss_GC();  table.foretell(allocation)

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
from sweeps.bits.meter import Meter
from sweeps.bits.problem import Allocation, Problem


@dataclass
class Sensitivities:
    problem: Problem
    path: Path
    identity: Mapping[str, Any]
    """What the numbers depend on: model, rows, choices."""
    around: str
    """The choice of the groups that are not looked at."""
    tables: dict[str, dict[str, Any]]
    """Of every base choice: `base`, the KL with it everywhere (None: not measured yet), and `kl`."""

    @classmethod
    def open(cls, out: Path, problem: Problem, identity: Mapping[str, Any], *, around: str) -> "Sensitivities":
        """What is known so far; ConfigError when the file belongs to another model, other rows or other choices."""
        path = out / "sensitivities.json"
        tables: dict[str, dict[str, Any]] = {}
        if path.is_file():
            try:
                content = json.loads(path.read_text())
                found, tables = content["identity"], content["around"]
            except (ValueError, KeyError, TypeError) as error:
                mend = "remove it, or give another --out"
                raise DataError(f"{path}: cannot be read ({first_line(error)}); {mend}") from None
            for key in identity:
                if found.get(key) != identity[key]:
                    raise ConfigError(
                        f"--out {out}: holds a search with {key} = {found.get(key)}, this one has "
                        f"{identity[key]}; give another --out"
                    )
        tables.setdefault(around, {"base": None, "kl": {group.name: {} for group in problem.groups}})
        return cls(problem, path, identity, around, tables)

    @property
    def base(self) -> float:
        """KL with the base choice everywhere, nats a token."""
        return self.tables[self.around]["base"]

    @property
    def kl(self) -> dict[str, dict[str, float]]:
        """Group -> label -> KL with that choice for this group alone."""
        return self.tables[self.around]["kl"]

    def missing(self) -> list[tuple[str, str]]:
        """Group and label of what is still to be measured."""
        return [
            (group.name, label)
            for group in self.problem.groups
            for label in self.problem.labels
            if label != self.around and label not in self.kl[group.name]
        ]

    def fill(self, meter: Meter, check_stop: Callable[[], None]) -> None:
        """Measure what is missing; check_stop may raise between two measurements."""
        everywhere = self.problem.uniform(self.around)
        if self.base is None:
            self.tables[self.around]["base"] = meter.measure(everywhere).mean
        for group, label in self.missing():
            check_stop()
            self.kl[group][label] = meter.measure(everywhere | {group: label}).mean
            content = {"identity": self.identity, "around": self.tables}
            write_atomic(self.path, json.dumps(content, indent=1) + "\n")

    def loss_GC(self) -> NDArray[np.float64]:
        """Nats a token beyond the base [groups, choices]; below 0 where a choice is better than the base."""
        return np.array(
            [
                [self.kl[group.name].get(label, self.base) - self.base for label in self.problem.labels]
                for group in self.problem.groups
            ]
        )

    def foretell(self, allocation: Allocation) -> float:
        """The KL of a whole allocation if what groups change alone adds up."""
        return self.base + sum(
            self.kl[group.name].get(allocation[group.name], self.base) - self.base for group in self.problem.groups
        )
