"""A student equal to its teacher: no loss, no gradient, whatever the labels are.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace

from distill.conformance.problem import draw, identical
from distill.conformance.target import Target
from distill.conformance.verdict import Check, Comparison, equal


def zero_at_identity(target: Target) -> Iterator[Comparison]:
    """The soft loss of identical models is 0, and so is its gradient."""
    target.needs_loss(sampled=False)
    for name, options in target.variants():
        for temperature in target.temperatures():
            chosen = options | ({} if temperature == 1 else {"temperature": temperature})
            answer = target.run(identical(draw(10)), **chosen)
            yield equal(f"{name} at temperature {temperature:g}", 0.0, answer.value, within=target.within)
            # |p - q| has a kink there: rounding decides which side its gradient is of.
            if name != "tvd":
                largest = answer.gradient_TV.abs().max().item()
                yield equal(f"largest gradient of {name}", 0.0, largest, within=target.within)


def labels_do_not_matter(target: Target) -> Iterator[Comparison]:
    """The soft loss alone does not change with the labels."""
    target.needs_loss()
    target.needs("labels")
    problem = draw(11)
    other = replace(problem, labels_T=problem.labels_T.flip(0))
    for name, options in target.variants():
        expected = target.value(problem, **options)
        yield equal(name, expected, target.value(other, **options), within=target.close_to(expected))


CHECKS = (
    Check(
        "zero_at_identity",
        "a student equal to its teacher has soft loss 0 and gradient 0",
        zero_at_identity,
        (3, 7, 10),
        "DistillKit `zero` (renormalised teacher), TRL #5731 (hidden term), torchtune (cross-entropy)",
    ),
    Check(
        "labels_do_not_matter",
        "with alpha = 1, or a loss that has no alpha, labels change nothing",
        labels_do_not_matter,
        (7,),
        "TRL #5731: a cross-entropy term on one of its paths",
    ),
)
