"""Tokens without a label: which they are, that they count nowhere, and a batch that has only such.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from distill.conformance.problem import IGNORED, Problem, draw
from distill.conformance.target import Target
from distill.conformance.verdict import Check, Comparison, at_least, equal

# A prompt, a gap, and an end: each tells a shifted mask from one that is not.
HIDDEN = (0, 1, 2, 6, 10, 11)


def _alphas(target: Target) -> list[dict[str, Any]]:
    return [{"alpha": alpha} for alpha in (1.0, 0.5)] if target.takes("alpha", "labels") else [{}]


def ignored_positions(target: Target) -> Iterator[Comparison]:
    """Where the next label is ignored the gradient is exactly 0, elsewhere it is not; their logits count nowhere."""
    target.needs_loss()
    target.needs_mask()
    problem = draw(60, spread=1.0, ignored=HIDDEN)
    moved = replace(problem, student_TV=problem.student_TV + 2 * draw(61).student_TV * ~problem.valid_T[:, None])
    for options in _alphas(target):
        for name, chosen in target.variants():
            answer = target.run(problem, **options, **chosen)
            largest_T = answer.gradient_TV.abs().amax(1)
            ignored = largest_T[~problem.valid_T].max().item()
            yield equal(f"{name}: largest gradient where no label follows", 0.0, ignored, within=0.0)
            least = largest_T[problem.valid_T].min().item()
            yield at_least(f"{name}: least gradient of a token with a label", 1e-6, least)
            value = target.value(moved, **options, **chosen)
            what = f"{name} when logits change where no label follows"
            yield equal(what, answer.value, value, within=target.close_to(answer.value))
    if target.takes("labels", "ignore_index"):
        yield _other_index(target, problem)


def _other_index(target: Target, problem: Problem) -> Comparison:
    renamed = replace(problem, labels_T=problem.labels_T.masked_fill(~problem.valid_T, -1))
    expected = target.value(problem)
    value = target.value(renamed, ignore_index=-1)
    return equal("with ignore_index = -1", expected, value, within=target.close_to(expected))


def all_ignored(target: Target) -> Iterator[Comparison]:
    """A batch without any label has loss 0 and gradient 0, not NaN."""
    target.needs_loss()
    target.needs_mask()
    problem = draw(62)
    nothing = replace(problem, labels_T=torch.full_like(problem.labels_T, IGNORED))
    for options in _alphas(target):
        for name, chosen in target.variants():
            answer = target.run(nothing, **options, **chosen)
            yield equal(f"{name} of no token", 0.0, answer.value, within=0.0)
            largest = answer.gradient_TV.abs().max().item()
            yield equal(f"{name}: largest gradient of no token", 0.0, largest, within=0.0)


CHECKS = (
    Check(
        "ignored_positions",
        "a position gets gradient exactly when the label it predicts counts",
        ignored_positions,
        (8,),
        "DistillKit: the mask of labels was not shifted",
    ),
    Check("all_ignored", "a batch without labels has loss 0 and gradient 0", all_ignored, (13,), "torchtune: NaN"),
)
