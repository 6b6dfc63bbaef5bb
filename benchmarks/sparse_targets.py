"""What do a cache's sparse targets cost a student, where the truth is known? Every codec at the same bytes, and dense.

    python benchmarks/sparse_targets.py [--seeds 5]

A good frozen teacher, clean text, the students of benchmarks/weighting.py, a constant weight and the default. Targets
are encoded to bytes and read back. Finished seeds are kept in benchmarks/results/sparse_targets.json.
Shapes: A students, T tokens of a step, V vocabulary.
"""

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch
from known_truth import TOKENS_A_STEP, VOCABULARY, Students, World
from quality import interval
from weighting import STEPS, STUDENT, STUDENT_RATE, Teacher
from weighting_arms import Arm, teach

from distill.losses import distillation_from_logits
from distill.schedule import learning_rate
from herd.run.files import write_atomic
from herd.run.schema import Optim
from teachers.cache.codecs import CODECS, Codec, Kept, encode_rows
from teachers.cache.codecs.densify import sparse_targets
from teachers.targets import DenseTargets, SparseTargets

RESULTS = Path(__file__).resolve().parent / "results" / "sparse_targets.json"
BYTES = (9, 18, 36)
WEIGHTS: dict[str, dict[str, Any]] = {
    "constant 0.9": {"kind": "constant", "alpha": 0.9},
    "default": {"kind": "maturity"},
}
MOST = {"head_and_tail": 255, "rs_kd": 1024, "top_k": 256}


def encoded(
    codec: Codec, teacher_TV: torch.Tensor, labels_NL: torch.Tensor, keys_N: torch.Tensor
) -> tuple[float, SparseTargets]:
    """Bytes a token of these rows, and what is read back from them."""
    vocabulary, length = teacher_TV.shape[1], labels_NL.shape[1]
    payloads = encode_rows(codec, DenseTargets(teacher_TV), labels_NL, keys_N, vocabulary=vocabulary)
    kept = [Kept.from_bytes(payload, num_tokens=length, vocabulary=vocabulary) for payload in payloads]
    bytes_a_token = sum(map(len, payloads)) / labels_NL.numel()
    return bytes_a_token, sparse_targets(kept, length, tail=codec.tail, temperature=1.0)


def largest(
    name: str, most_bytes: float, teacher_TV: torch.Tensor, labels_NL: torch.Tensor, keys_N: torch.Tensor
) -> Codec:
    """The codec of this name that keeps most within so many bytes a token."""
    fits, fails = 1, MOST[name] + 1
    while fails - fits > 1:
        tried = (fits + fails) // 2
        if encoded(CODECS[name](tried), teacher_TV, labels_NL, keys_N)[0] <= most_bytes:
            fits = tried
        else:
            fails = tried
    return CODECS[name](fits)


class Lesson:
    """One seed: a student for every form of target and weight, and one alone."""

    def __init__(self, seed: int) -> None:
        self._world, self._teacher = World.of("clean", seed=seed, steps=STEPS), Teacher("good", seed)
        context_TX, labels_T = self._world.batch(0)
        teacher_TV = self._teacher.read(context_TX, labels_T, 0)
        self._codecs = {
            (name, size): largest(name, size, teacher_TV, labels_T[None], torch.tensor([0]))
            for name, size in product(CODECS, BYTES)
        }
        forms = [None, *self._codecs]
        self._designs = [
            (form, name, Arm(name, WEIGHTS[name]).build(steps=STEPS)) for form, name in product(forms, WEIGHTS)
        ]
        self._students = Students(1 + len(self._designs), seed=seed, **STUDENT)
        self._bytes: dict[tuple[str, int], list[float]] = {form: [] for form in self._codecs}

    def run(self) -> dict[str, Any]:
        """KL to the truth of every student; the codecs' sizes and mean bytes."""
        for step in range(STEPS):
            self._step(step)
        with torch.no_grad():
            alone, *kl_A = self._world.excess(self._students.logits(self._world.heldout_EX))
        found: dict[str, Any] = {"alone": alone, "codecs": {}}
        found |= {name: {} for name in WEIGHTS}
        for (form, name, _), kl in zip(self._designs, kl_A, strict=True):
            found[name][label(form)] = kl
        for form, codec in self._codecs.items():
            found["codecs"][label(form)] = {"size": codec.size, "bytes": statistics.mean(self._bytes[form])}
        return found

    def _step(self, step: int) -> None:
        context_TX, labels_T = self._world.batch(step)
        teacher_TV = self._teacher.read(context_TX, labels_T, step)
        targets: dict[Any, Any] = {None: DenseTargets(teacher_TV)}
        for form, codec in self._codecs.items():
            size, targets[form] = encoded(codec, teacher_TV, labels_T[None], torch.tensor([step]))
            self._bytes[form].append(size)
        alone_TV, *logits_A = self._students.logits(context_TX).unbind()
        losses = [distillation_from_logits(alone_TV, labels_T).loss]
        for (form, _, design), logits_TV in zip(self._designs, logits_A, strict=True):
            out = distillation_from_logits(
                logits_TV, labels_T, targets[form], alpha=design.alpha, chunk_tokens=2 * TOKENS_A_STEP
            )
            losses.append(out.loss)
            teach(design, out.stats_ST, step)
        self._students.step(sum(losses), learning_rate(Optim(), step, steps=STEPS, peak=STUDENT_RATE))


def label(form: tuple[str, int] | None) -> str:
    """`dense`, or a codec and its bytes a token."""
    return "dense" if form is None else f"{form[0]} at {form[1]}"


def compare(runs: list[dict[str, Any]], *, vocabulary: int) -> list[dict[str, Any]]:
    """Every form and weight: the share of the dense target's gain over the student alone that is lost, in per cent."""
    rows = []
    for name in filter(runs[0].__contains__, WEIGHTS):
        for form in runs[0][name]:
            lost = [(run[name][form] - run[name]["dense"]) / (run["alone"] - run[name]["dense"]) * 100 for run in runs]
            rows.append(
                {
                    "weight": name,
                    "targets": form,
                    "bytes": statistics.mean(run["codecs"].get(form, {}).get("bytes", 4 * vocabulary) for run in runs),
                    "sizes": [run["codecs"].get(form, {}).get("size") for run in runs],
                    "to_alone": statistics.mean(run[name][form] - run["alone"] for run in runs),
                    "lost_percent": statistics.mean(lost),
                    "lost_ci95": interval(lost),
                }
            )
    return rows


def describe(rows: list[dict[str, Any]]) -> str:
    """One line for each form and weight."""
    lines = []
    for row in rows:
        low, high = row["lost_ci95"]
        lines.append(
            f"{row['weight']:13} {row['targets']:20} {row['bytes']:7.1f} B   to alone {row['to_alone']:+.4f}   "
            f"of the gain lost {row['lost_percent']:+.2f} % [{low:+.2f}, {high:+.2f}]"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = [str(seed) for seed in range(parser.parse_args().seeds)]
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    for seed in seeds:
        if seed not in runs:
            runs[seed] = Lesson(int(seed)).run()
            write_atomic(RESULTS, json.dumps({"runs": runs}) + "\n")
    rows = compare([runs[seed] for seed in seeds], vocabulary=VOCABULARY)
    write_atomic(RESULTS, json.dumps({"runs": runs, "rows": rows}, indent=1) + "\n")
    print(describe(rows))


if __name__ == "__main__":
    main()
