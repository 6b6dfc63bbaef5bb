"""Temperature and the mix of soft and hard loss do what they are called.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterator

import torch

from distill.conformance.problem import draw
from distill.conformance.target import Target
from distill.conformance.verdict import Check, Comparison, differs, equal


def temperature_is_used(target: Target) -> Iterator[Comparison]:
    """Another temperature is another loss, beyond a factor."""
    target.needs_loss()
    target.needs("temperature")
    for name, options in target.variants():
        cold, warm = (target.run(draw(50), temperature=t, **options) for t in (1.0, 2.0))
        yield differs(f"{name} at temperature 2 and 1", cold.value, warm.value, by=100 * target.within)
        aligned = torch.nn.functional.cosine_similarity(cold.gradient_TV.flatten(), warm.gradient_TV.flatten(), dim=0)
        yield differs(f"cosine of the two gradients of {name}", 1.0, aligned.item(), by=100 * target.within)


def mixture(target: Target) -> Iterator[Comparison]:
    """(1 - alpha) CE + alpha soft: cross-entropy at 0, and a straight line between."""
    target.needs_loss()
    target.needs("alpha", "labels")
    problem = draw(51, ignored=(2, 7))
    hard = torch.nn.functional.cross_entropy(problem.student_TV, problem.labels_T, ignore_index=-100, reduction="sum")
    expected = hard.item() / target.scale(problem)
    for name, options in target.variants():
        none, some, all_ = (target.value(problem, alpha=alpha, **options) for alpha in (0.0, 0.3, 1.0))
        yield equal("alpha = 0, the cross-entropy", expected, none, within=target.close_to(expected))
        line = 0.7 * none + 0.3 * all_
        yield equal(f"{name}, alpha = 0.3", line, some, within=target.close_to(line))


CHECKS = (
    Check(
        "temperature_is_used",
        "another temperature gives another loss, and another direction of the gradient",
        temperature_is_used,
        (6,),
        "TRL GKD: its loss did not see `temperature`",
    ),
    Check("mixture", "the loss is (1 - alpha) cross-entropy + alpha soft loss", mixture),
)
