"""Padding of the vocabulary has no mass, and how much of it there is must not matter.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace

from distill.conformance.problem import Problem, draw, identical, widen
from distill.conformance.target import Target
from distill.conformance.verdict import Check, Comparison, NotApplicable, equal

PADDING = 5


def wider_vocabulary(target: Target) -> Iterator[Comparison]:
    """Rows that one model has beyond the other's, without mass, change nothing."""
    target.needs_loss()
    if target.sparse or not (target.takes("teacher_logits") or target.takes("teacher_head")):
        raise NotApplicable("takes no teacher logits: there are no two vocabularies to compare")
    refusals = []
    for case, problem in (("identical models", identical(draw(20))), ("two models", draw(20))):
        for name, options in target.variants():
            expected = target.value(problem, **options)
            for side in ("teacher_TV", "student_TV"):
                wider = replace(problem, **{side: widen(getattr(problem, side), PADDING)})
                value = _value_or_refusal(target, wider, options)
                if isinstance(value, str):
                    refusals.append(value)
                    continue
                what = f"{name} of {case}, {side.removesuffix('_TV')} padded"
                yield equal(what, expected, value, within=target.close_to(expected))
    if len(refusals) == 4 * len(target.divergences):
        raise NotApplicable(f"refuses vocabularies of two sizes: {refusals[0]}")


def _value_or_refusal(target: Target, problem: Problem, options: dict[str, str]) -> float | str:
    """Refusing is no defect: nobody is misled. What counts is a number that is wrong."""
    try:
        return target.value(problem, **options)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def vocabulary_size(target: Target) -> Iterator[Comparison]:
    """Padding without mass on both sides changes nothing: the loss is a sum over classes, not a mean."""
    target.needs_loss()
    problem = draw(21)
    wider = replace(
        problem, student_TV=widen(problem.student_TV, PADDING), teacher_TV=widen(problem.teacher_TV, PADDING)
    )
    for name, options in target.variants():
        expected = target.value(problem, **options)
        what = f"{name} with {PADDING} classes of padding"
        yield equal(what, expected, target.value(wider, **options), within=target.close_to(expected))


CHECKS = (
    Check(
        "wider_vocabulary",
        "classes only one model has, without mass, change nothing (or are refused)",
        wider_vocabulary,
        (1,),
        "Liger's chunked JSD pads the student's logits with 0",
    ),
    Check(
        "vocabulary_size",
        "the loss does not depend on how much padding both vocabularies have",
        vocabulary_size,
        (11,),
        "ModelOpt's default and torch's kl_div with `mean`: a mean over classes",
    ),
)
