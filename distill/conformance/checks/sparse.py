"""Targets that list a few classes: where such a loss leads a student, and that a bucket holds the rest.

Shapes: T tokens, V vocabulary, K classes listed.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from distill.conformance.problem import Problem, draw, identical
from distill.conformance.target import Target
from distill.conformance.verdict import Check, Comparison, NotApplicable, at_least, at_most, differs

MARGIN = 0.01
"""Of probability mass."""
STEPS = 100


def _head() -> Problem:
    """Two tokens whose listed classes have about half of the teacher's mass."""
    return draw(33, tokens=2, classes=24, spread=1.0, listed=5)


def _mass(logits_TV: torch.Tensor, problem: Problem) -> torch.Tensor:
    return torch.softmax(logits_TV, 1).gather(1, problem.sparse(1.0)[0]).sum(1)


def _led_from_the_teacher(target: Target, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass [T] on the listed classes: the teacher's, and that of a student that starts there and descends.

    The steps shrink as 1/n: a right loss stays where it is though rounding, or the kink of |p - q|, pushes it about.
    """
    problem = identical(_head())
    student_TV = problem.student_TV
    for step in range(STEPS):
        answer = target.run(replace(problem, student_TV=student_TV), **options)
        student_TV = student_TV - target.scale(problem) / (1 + step) * answer.gradient_TV
    return _mass(problem.teacher_TV, problem), _mass(student_TV, problem)


def head_mass(target: Target) -> Iterator[Comparison]:
    """Descending from the teacher, a student does not move mass onto the listed classes."""
    target.needs_loss(sampled=False, sparse=True)
    for name, options in target.variants():
        teacher_T, student_T = _led_from_the_teacher(target, options)
        for token, (mass, got) in enumerate(zip(teacher_T.tolist(), student_T.tolist(), strict=True)):
            yield at_most(f"{name}: mass on listed classes, token {token}", mass, got, within=MARGIN)


def mass_on_support(target: Target) -> Iterator[Comparison]:
    """Nor off them."""
    target.needs_loss(sampled=False, sparse=True)
    for name, options in target.variants():
        teacher_T, student_T = _led_from_the_teacher(target, options)
        for token, (mass, got) in enumerate(zip(teacher_T.tolist(), student_T.tolist(), strict=True)):
            yield at_least(f"{name}: mass on listed classes, token {token}", mass, got, within=MARGIN)


def tail_matters(target: Target) -> Iterator[Comparison]:
    """More mass on everything that is not listed is noticed."""
    target.needs_loss(sampled=False, sparse=True)
    problem = identical(_head())
    unlisted_TV = torch.ones_like(problem.student_TV).scatter_(1, problem.sparse(1.0)[0], 0.0)
    for name, options in target.variants():
        before = target.value(problem, **options)
        after = target.value(replace(problem, student_TV=problem.student_TV + 3 * unlisted_TV), **options)
        yield differs(f"{name} with 3 added to all other logits", before, after, by=100 * target.within)


def data_processing(target: Target) -> Iterator[Comparison]:
    """Listing more classes never makes two models look more alike."""
    target.needs_loss(sampled=False, sparse=True)
    if target.divergences == ("adaptive_kl",):
        raise NotApplicable("adaptive_kl is no f-divergence")
    classes = 11
    for name, options in target.variants():
        if name == "adaptive_kl":
            continue
        for seed in range(6):
            problem, coarser = draw(seed, tokens=1, classes=classes), 0.0
            for listed in (1, 2, 4, 7, classes - 1, classes):
                value = target.value(replace(problem, listed=listed), **options)
                what = f"{name}, pair {seed}, {listed} classes listed"
                yield at_least(what, coarser, value, within=target.close_to(coarser))
                coarser = value


CHECKS = (
    Check(
        "head_mass",
        "a student at its teacher is not led to put more mass on the listed classes",
        head_mass,
        (2, 3),
        "verl (truncated), DistillKit `zero` (renormalised teacher): 0.999 where the teacher has 0.558",
    ),
    Check(
        "mass_on_support",
        "a student at its teacher is not led to take mass off the listed classes",
        mass_on_support,
        (5,),
        "verl #5041: truncated reverse KL collapses",
    ),
    Check(
        "tail_matters",
        "3 added to the logits of all classes that are not listed changes the loss",
        tail_matters,
        (4,),
        "ModelOpt's top-k loss, MaxText offline: both sides renormalised",
    ),
    Check("data_processing", "listing more classes never lowers the loss", data_processing),
)
