"""Every weight between soft and hard targets on real text, with small Llama 4 models: what is left of the other lab?

    python benchmarks/real_text.py [--seeds 5] [--show maturity "maturity at 2"] [--tables]

The standard library, held-out text, students of benchmarks/nano_models.py. Within a seed all arms read the same batches
and one teacher's answers, made once. Finished runs are kept in benchmarks/results/real_text.json, not run again.
Shapes: T tokens of a step, S statistics of distill.losses.kernel.STATS.
"""

import argparse
import json
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import sparse_targets
import torch
from nano_models import OPTIM, STEPS, STUDENT, STUDENT_RATE, VOCABULARY, Network, Teacher, Text
from weighting_arms import CONSTANTS, DYNAMIC, TEMPERATURES, Arm, fifths, save, teach
from weighting_table import (
    ALONE,
    compare,
    differences_table,
    goals_table,
    intervals_table,
    temperatures_table,
)

from distill import weighting
from distill.schedule import learning_rate
from herd.data.batches import Batch
from teachers.cache.codecs import CODECS, Codec
from teachers.targets import SoftTargets

RESULTS = Path(__file__).resolve().parent / "results" / "real_text.json"
CELLS = ("good", "co", "hasty", "ahead", "weak")
EVALUATE_EVERY = 10
"""Steps between the held-out losses that `slope` sees."""
AT_2 = (0.5, 0.7, 0.9)
LEFT_OUT = ("gap token", "gap entropy", "surgery", "linear up")
"""For their cost: where the truth is known they are far behind or, the second and third, the same as others."""
FEWER = {
    "ahead": (0.3, 0.5, 0.7, 0.9),
    "weak": (0.5, 0.7, 0.9),
    "hasty": (0.1, 0.3, 0.5),
}
"""Constants at temperature 1 in the cells that have the designs of DESIGNS_OF_FEWER only."""
DESIGNS_OF_FEWER = ("maturity", "maturity at 2", "lead", "gap step")
BYTES = 36
FIRST = {
    "good": (ALONE, "0.7 at 1", "0.9 at 1", "0.9 at 2", "maturity", "maturity at 2", "maturity to 0.95 at 1"),
    "co": ("0.3 at 1", "0.5 at 1", "maturity", "maturity at 2"),
    "hasty": ("0.3 at 1", "0.5 at 1", "maturity", "maturity at 2"),
}
"""Arms that decide; measured with all seeds before the others are with any."""
SIZED_ON = 8
"""Steps whose rows say how much a codec may keep."""


def arms(cell: str) -> list[Arm]:
    """Those of benchmarks/weighting.py that are affordable here, in most cells a choice of them."""
    grid = [Arm(f"{alpha:g} at 1", alpha) for alpha in CONSTANTS] + [
        Arm(f"{alpha:g} at 2", alpha, 2.0) for alpha in AT_2
    ]
    dynamic = [Arm(name, settings) for name, settings in DYNAMIC.items() if name not in LEFT_OUT]
    maturity = DYNAMIC["maturity"]
    higher = [Arm(f"maturity to 0.95 at {heat:g}", maturity | {"peak": 0.95}, heat) for heat in TEMPERATURES]
    chosen = [Arm(ALONE, 0.0), *grid, *dynamic, Arm("maturity at 2", maturity, 2.0), *higher]
    if cell == "good":
        chosen += [Arm(sparse_name(codec), maturity, codec=codec) for codec in CODECS]
    if cell in FEWER:
        named = (ALONE, *(f"{alpha:g} at 1" for alpha in FEWER[cell]), *DESIGNS_OF_FEWER)
        chosen = [arm for arm in chosen if arm.name in named or (cell != "hasty" and arm.name == "0.9 at 2")]
    return chosen


def sparse_name(codec: str) -> str:
    """The default's arm with what this codec keeps."""
    return f"maturity from {sparse_targets.label((codec, BYTES))}"


class Pupil:
    """One arm's student."""

    def __init__(self, arm: Arm, seed: int) -> None:
        self.arm, self.alphas = arm, []
        self.network = Network("scout-nano", STUDENT, seed=seed)
        self.design = arm.build(steps=STEPS) if isinstance(arm.weight, dict) else None

    def learn(self, batch: Batch, targets: SoftTargets, step: int) -> None:
        """One step; the design learns from it too."""
        alpha = self.arm.weight if self.design is None else self.design.alpha
        taught = {} if self.arm.name == ALONE else {"targets": targets, "temperature": self.arm.temperature}
        loss, stats_ST, _ = self.network.measure(batch, alpha=alpha, **taught)
        self.network.update(loss, learning_rate(OPTIM, step, steps=STEPS, peak=STUDENT_RATE))
        if self.design is not None:
            self.alphas.append(teach(self.design, stats_ST, step))


class Lesson:
    """One cell with one seed: all arms' students in turn, batch by batch."""

    def __init__(self, cell: str, seed: int, chosen: list[Arm]) -> None:
        self._text, self._teacher = Text(seed), Teacher(cell, seed)
        self._pupils = [Pupil(arm, seed) for arm in chosen]
        self._codecs = {arm.codec: self._largest(arm.codec) for arm in chosen if arm.codec}
        self._bytes: dict[str, list[float]] = {name: [] for name in self._codecs}

    def _largest(self, codec: str) -> Codec:
        """As large as fits into BYTES on the rows of some steps."""
        batches = [self._text.batch(step) for step in range(SIZED_ON)]
        dense_TV = torch.cat([self._teacher.read(batch, 0).logits_TV for batch in batches])
        labels_NL, keys_N = (torch.cat([getattr(b, name) for b in batches]) for name in ("labels_BT", "keys_B"))
        return sparse_targets.largest(codec, BYTES, dense_TV, labels_NL, keys_N)

    def run(self) -> dict[str, Any]:
        """Held-out loss of every arm at the end, and of the teacher."""
        for step in range(STEPS):
            self._step(step)
        found: dict[str, Any] = {"teacher_ce": round(self._teacher.network.heldout(self._text.heldout), 5), "arms": {}}
        for pupil in self._pupils:
            arm: dict[str, Any] = {"ce": round(pupil.network.heldout(self._text.heldout), 5)}
            if pupil.alphas:
                arm["alpha"] = fifths(pupil.alphas)
            if (codec := pupil.arm.codec) is not None:
                arm |= {"size": self._codecs[codec].size, "bytes": round(statistics.mean(self._bytes[codec]), 2)}
            found["arms"][pupil.arm.name] = arm
        return found

    def _step(self, step: int) -> None:
        batch = self._text.batch(step)
        forms: dict[str | None, SoftTargets] = {None: self._teacher.read(batch, step)}
        for name, codec in self._codecs.items():
            size, forms[name] = sparse_targets.encoded(codec, forms[None].logits_TV, batch.labels_BT, batch.keys_B)
            self._bytes[name].append(size)
        for pupil in self._pupils:
            pupil.learn(batch, forms[pupil.arm.codec], step)
            if isinstance(pupil.design, weighting.Slope) and (step + 1) % EVALUATE_EVERY == 0:
                pupil.design.see_heldout(step + 1, pupil.network.heldout(self._text.probe))


def finished() -> dict[str, Any]:
    """The runs that are there already."""
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}


def run_all(seeds: int) -> dict[str, Any]:
    """Every cell with every seed; saved after each. Alone, a student is the same in all cells."""
    runs = finished()
    first = {cell: [arm for arm in arms(cell) if arm.name in names or arm.codec] for cell, names in FIRST.items()}
    for chosen in (first, {cell: arms(cell) for cell in CELLS}):
        for cell, seed in product(chosen, range(seeds)):
            name = f"{cell}/{seed}"
            done = runs.get(name, {"arms": {}})
            done["arms"] |= {ALONE: runs[f"good/{seed}"]["arms"][ALONE]} if cell != "good" else {}
            missing = [arm for arm in chosen[cell] if arm.name not in done["arms"]]
            if missing:
                began = time.process_time()
                found = Lesson(cell, seed, missing).run()
                runs[name] = found | {"arms": done["arms"] | found["arms"]}
                save(RESULTS, {"runs": runs})
                print(f"{name}: {len(missing)} students in {time.process_time() - began:.0f} CPU s", flush=True)
    return runs


def sparse_rows(runs: dict[str, Any]) -> list[dict[str, Any]]:
    """What the codecs lose of the gain that the default has from whole distributions."""
    shaped = []
    for arms in (run["arms"] for name, run in runs.items() if name.startswith("good/")):
        forms = {sparse_targets.label((codec, BYTES)): arms[sparse_name(codec)] for codec in CODECS}
        nats = {"dense": arms["maturity"]["ce"]} | {form: arm["ce"] for form, arm in forms.items()}
        shaped.append({"alone": arms[ALONE]["ce"], "codecs": forms, "default": nats})
    return sparse_targets.compare(shaped, vocabulary=VOCABULARY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--show", nargs="+", default=["maturity", "maturity at 2"], help="designs shown with intervals")
    parser.add_argument("--tables", action="store_true", help="only those of the runs that are finished")
    arguments = parser.parse_args()
    runs = finished() if arguments.tables else run_all(arguments.seeds)
    cells, sparse = compare(runs, measure="ce"), sparse_rows(runs)
    save(
        RESULTS,
        {"runs": runs, "cells": cells, "sparse": {row["targets"] + ", " + row["weight"]: row for row in sparse}},
    )
    print("Thousandths of a nat of held-out loss, differences; below 0 is better.")
    tables = (differences_table, temperatures_table, goals_table)
    print(*(table(cells) for table in tables), intervals_table(cells, arguments.show), sep="\n\n")
    print(sparse_targets.describe(sparse))


if __name__ == "__main__":
    main()
