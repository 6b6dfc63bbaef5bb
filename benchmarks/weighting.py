"""Every weight between soft and hard targets where the truth is known: which teacher helps, and which one costs?

    python benchmarks/weighting.py [--seeds 5] [--show maturity lead]

Students of four dozen arms learn side by side from the same batches; every arm is compared, seed by seed, with the
student alone and with the best constant. Finished runs are kept in benchmarks/results/weighting.json, not run again.
Shapes: A students, T tokens of a step, X tokens of context, V vocabulary.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from known_truth import TOKENS_A_STEP, Students, Truth, World, ce_of, trained_alone
from weighting_arms import TEMPERATURES, Arm, arms, fifths, save, teach
from weighting_table import compare, differences_table, goals_table, intervals_table, temperatures_table

from distill import weighting
from distill.losses import Alpha, Distillation, distillation_from_logits
from distill.losses.token_stats import TokenStats
from distill.schedule import learning_rate
from herd.run.schema import Optim
from teachers.targets import DenseTargets

RESULTS = Path(__file__).resolve().parent / "results" / "weighting.json"
STEPS = 200
STUDENT, TEACHER = {"width": 48}, {"width": 128}
STUDENT_RATE, TEACHER_RATE, LATE_RATE = 8e-3, 6e-3, 2e-3
FROZEN_STEPS = {"good": 2000, "weak": 250, "wrong": 1000}
HEAD_START = 80
EVALUATE_EVERY = 15
"""Steps between the held-out losses that `slope` sees."""
TEACHERS = ("good", "weak", "ahead", "co", "immature", "wrong")
DATA = ("clean", "shift", "noise")
CELLS = [
    (teacher, data) for teacher in TEACHERS for data in DATA if data == "clean" or teacher in ("good", "weak", "co")
]


@lru_cache
def frozen_teacher(kind: str, seed: int) -> Students:
    """`good` and `weak` read the students' language for a long and a short time; `wrong` read another one."""
    truth = Truth(900 + seed) if kind == "wrong" else Truth(2 * seed + 1)
    return trained_alone(truth, seed=seed, steps=FROZEN_STEPS[kind], rate=TEACHER_RATE, **TEACHER)


class Teacher:
    """A cell's: frozen, or learning from the students' batches: after a head start (`ahead`), with them, or slowly."""

    def __init__(self, kind: str, seed: int) -> None:
        self._rate = {"ahead": TEACHER_RATE, "co": TEACHER_RATE, "immature": LATE_RATE}.get(kind)
        self._steps = STEPS + head_start(kind)
        self.network = Students(1, seed=50 + seed, **TEACHER) if self._rate else frozen_teacher(kind, seed)

    def read(self, context_TX: torch.Tensor, labels_T: torch.Tensor, step: int) -> torch.Tensor:
        """Its logits [T, V] before it learns from these labels, in its own step of this number."""
        if self._rate is None:
            with torch.no_grad():
                return self.network.logits(context_TX)[0]
        logits_TV = self.network.logits(context_TX)[0]
        loss = torch.nn.functional.cross_entropy(logits_TV, labels_T)
        self.network.step(loss, learning_rate(Optim(), step, steps=self._steps, peak=self._rate))
        return logits_TV.detach()


def head_start(kind: str) -> int:
    """Steps a teacher learns before its students begin."""
    return HEAD_START if kind == "ahead" else 0


class Lesson:
    """One cell with one seed: all arms' students, side by side."""

    def __init__(self, teacher: str, data: str, seed: int, chosen: list[Arm]) -> None:
        self._start, self._teacher = head_start(teacher), Teacher(teacher, seed)
        self._world = World.of(data, seed=seed, steps=self._start + STEPS)
        self._arms, self._students = chosen, Students(len(chosen), seed=seed, **STUDENT)
        self._designs = {
            place: arm.build(steps=STEPS) for place, arm in enumerate(chosen) if isinstance(arm.weight, dict)
        }
        self._alphas: dict[int, list[float]] = {place: [] for place in self._designs}

    def run(self) -> dict[str, Any]:
        """Exact KL to the truth and held-out loss of every arm at the end, and of the teacher."""
        for step in range(self._start):
            self._teacher.read(*self._world.batch(step), step)
        for step in range(STEPS):
            self._step(step)
        with torch.no_grad():
            logits_AEV = self._students.logits(self._world.heldout_EX)
            teacher_EV = self._teacher.network.logits(self._world.heldout_EX)
        pairs = zip(self._arms, self._world.excess(logits_AEV), self._world.heldout_ce(logits_AEV), strict=True)
        found = {arm.name: {"kl": round(kl, 5), "ce": round(ce, 5)} for arm, kl, ce in pairs}
        for place, alphas in self._alphas.items():
            found[self._arms[place].name]["alpha"] = fifths(alphas)
        return {"teacher_kl": round(self._world.excess(teacher_EV)[0], 5), "arms": found}

    def _step(self, step: int) -> None:
        place = self._start + step
        context_TX, labels_T = self._world.batch(place)
        teacher_TV = self._teacher.read(context_TX, labels_T, place)
        logits_A = self._students.logits(context_TX).unbind()
        losses = [self._constants(logits_A, labels_T, teacher_TV, heat) for heat in TEMPERATURES]
        losses += [self._designed(logits_A, labels_T, teacher_TV, heat, step) for heat in TEMPERATURES]
        self._students.step(sum(losses), learning_rate(Optim(), step, steps=STEPS, peak=STUDENT_RATE))
        self._probe(step)

    def _constants(
        self, logits_A: Sequence[torch.Tensor], labels_T: torch.Tensor, teacher_TV: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """The sum of the losses of all constant weights at one temperature."""
        own = [p for p, arm in enumerate(self._arms) if p not in self._designs and arm.temperature == temperature]
        alpha_A = torch.tensor([self._arms[place].weight for place in own])
        alpha = alpha_A.repeat_interleave(TOKENS_A_STEP)
        return together([logits_A[place] for place in own], labels_T, teacher_TV, alpha, temperature).loss

    def _designed(
        self, logits_A: Sequence[torch.Tensor], labels_T: torch.Tensor, teacher_TV: torch.Tensor, heat: float, step: int
    ) -> torch.Tensor:
        """The sum of the losses of all designs at one temperature, each of which learns from the step."""
        own = [place for place in self._designs if self._arms[place].temperature == heat]
        turn = InTurn([self._designs[place] for place in own])
        out = together([logits_A[place] for place in own], labels_T, teacher_TV, turn.alpha, heat)
        for place, stats_ST in zip(own, out.stats_ST.split(TOKENS_A_STEP, dim=1), strict=True):
            self._alphas[place].append(teach(self._designs[place], stats_ST, step))
        return out.loss

    def _probe(self, step: int) -> None:
        """Show held-out losses to the designs that learn from them; on text that the table is not measured on."""
        seeing = [place for place in self._designs if isinstance(self._designs[place], weighting.Slope)]
        if seeing and (step + 1) % EVALUATE_EVERY == 0:
            with torch.no_grad():
                context_EX, labels_E = self._world.probe
                ce_A = ce_of(self._students.logits(context_EX), labels_E)
            for place in seeing:
                self._designs[place].see_heldout(step + 1, ce_A[place])


class InTurn:
    """The designs of students whose tokens stand one after another, each asked about its own."""

    def __init__(self, designs: list[weighting.Weighting]) -> None:
        self._designs, self._seen = designs, 0

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        """Of the next tokens, all of one student."""
        design = self._designs[self._seen // TOKENS_A_STEP]
        self._seen += len(tokens.student_ce)
        return design.alpha(tokens)


def together(
    logits_A: list[torch.Tensor], labels_T: torch.Tensor, teacher_TV: torch.Tensor, alpha: Alpha, temperature: float
) -> Distillation:
    """The loss of several students with the same labels and teacher, the sum of their means, in one call."""
    count = len(logits_A)
    return distillation_from_logits(
        torch.cat([*logits_A, teacher_TV[:0]]),
        labels_T.repeat(count),
        DenseTargets(teacher_TV.repeat(count, 1)),
        alpha=alpha,
        temperature=temperature,
        normalizer=TOKENS_A_STEP,
        chunk_tokens=2 * TOKENS_A_STEP,  # the kernel takes halves: no block has tokens of two students
    )


def run_all(seeds: int) -> dict[str, Any]:
    """Every cell with every seed, what is missing of it; saved after each."""
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    for seed in range(seeds):
        for teacher, data in CELLS:
            name = f"{teacher}/{data}/{seed}"
            done = runs.get(name, {"arms": {}})
            missing = [arm for arm in arms() if arm.name not in done["arms"]]
            if missing:
                began = time.monotonic()
                found = Lesson(teacher, data, seed, missing).run()
                runs[name] = found | {"arms": done["arms"] | found["arms"]}
                save(RESULTS, {"runs": runs})
                print(f"{name}: {len(missing)} students in {time.monotonic() - began:.0f} s", flush=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--show", nargs="+", default=["maturity", "lead"], help="designs shown with intervals")
    arguments = parser.parse_args()
    runs = run_all(arguments.seeds)
    cells = compare(runs)
    save(RESULTS, {"runs": runs, "cells": cells})
    print("Thousandths of a nat of KL to the truth, differences; below 0 is better.")
    tables = (differences_table, temperatures_table, goals_table)
    print(*(table(cells) for table in tables), intervals_table(cells, arguments.show), sep="\n\n")


if __name__ == "__main__":
    main()
