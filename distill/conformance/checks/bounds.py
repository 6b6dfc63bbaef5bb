"""What every divergence obeys: never negative, 0 only at p = q, blind to a constant in the logits, Pinsker.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from distill.conformance.definitions import by_definition, log_distributions
from distill.conformance.problem import Problem, draw
from distill.conformance.target import Target
from distill.conformance.verdict import Check, Comparison, NotApplicable, at_least, equal

SPREADS = (0.3, 2.0, 6.0)


def _pairs() -> Iterator[tuple[str, Problem]]:
    """One token each: a mean over tokens could hide a negative one."""
    for seed in range(12):
        for spread in SPREADS:
            yield f"random pair {seed}, spread {spread:g}", draw(seed, tokens=1, spread=spread)
    for seed in range(4):
        problem = draw(seed, tokens=1)
        for factor in (0.5, 1.5, 3.0):
            yield f"student = {factor:g} teacher", replace(problem, student_TV=factor * problem.teacher_TV)


def _total_variation(target: Target, problem: Problem) -> float:
    pair = log_distributions(problem, problem.student_TV, temperature=1.0, sparse=target.sparse)
    return by_definition("tvd", *pair).item()


def non_negative(target: Target) -> Iterator[Comparison]:
    """No pair has a negative loss, and none that differs has none."""
    target.needs_loss(sampled=False)
    for name, options in target.variants():
        for case, problem in _pairs():
            value = target.value(problem, **options)
            yield at_least(f"{name}, {case}", 0.0, value, within=target.within)
            # A value below its own rounding says nothing.
            if _total_variation(target, problem) > 0.05:
                yield at_least(f"{name} of unequal models, {case}", 10 * target.within, abs(value))


def shift_invariance(target: Target) -> Iterator[Comparison]:
    """A constant added to all logits of a token changes nothing, so its gradient sums to 0."""
    target.needs_loss()
    problem = draw(12)
    constant_T1 = torch.linspace(-3, 3, len(problem.labels_T), dtype=torch.float64)[:, None]
    moved = replace(
        problem, student_TV=problem.student_TV + constant_T1, teacher_TV=problem.teacher_TV - 2 * constant_T1
    )
    for name, options in target.variants():
        before, after = target.run(problem, **options), target.run(moved, **options)
        yield equal(f"{name} of moved logits", before.value, after.value, within=target.close_to(before.value))
        total = before.gradient_TV.sum(1).abs().max().item()
        yield equal(f"sum of a token's gradient, {name}", 0.0, total, within=target.within)


def pinsker(target: Target) -> Iterator[Comparison]:
    """A KL is at least twice the square of the total variation."""
    target.needs_loss(sampled=False)
    kls = [(name, options) for name, options in target.variants() if name in ("forward_kl", "reverse_kl")]
    if not kls:
        raise NotApplicable(f"is a bound of KL divergences; this is {', '.join(target.divergences)}")
    for name, options in kls:
        for case, problem in _pairs():
            least = 2 * _total_variation(target, problem) ** 2
            yield at_least(f"{name}, {case}", least, target.value(problem, **options), within=target.within)


CHECKS = (
    Check(
        "non_negative",
        "no pair of distributions has a negative loss, none that differs has loss 0",
        non_negative,
        (2, 5, 16),
        "verl (truncated top-k), a clip of each entry proposed in TRL #5990",
    ),
    Check("shift_invariance", "a constant added to a token's logits changes nothing", shift_invariance),
    Check("pinsker", "KL >= 2 TVD^2 for every pair", pinsker),
)
