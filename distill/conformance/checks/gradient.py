"""Value against definition, gradient against autograd and against the slope of the value itself.

Shapes: T tokens, H width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from distill.conformance.definitions import DETACHED, by_definition, log_distributions
from distill.conformance.problem import draw
from distill.conformance.target import Target
from distill.conformance.verdict import Check, Comparison, NotApplicable, equal

# Step and tolerance of central differences: error step^2 in the value's curvature, rounding over step.
DIFFERENCES = {torch.float64: (1e-5, 1e-7), torch.float32: (1e-2, 5e-3)}


def definition(target: Target) -> Iterator[Comparison]:
    """Value and gradient of the divergence it is: declared, or the one its value was recognised as."""
    target.needs_loss(sampled=False)
    if target.divergences == ("other",):
        raise NotApplicable("declared as a divergence of its own")
    for name, options in target.variants():
        for temperature in target.temperatures():
            yield from _against(target, "forward_kl" if name == "unknown" else name, options, temperature)


def _against(target: Target, name: str, options: dict[str, Any], temperature: float) -> Iterator[Comparison]:
    problem = draw(80, spread=1.0)
    student_TV = problem.student_TV.clone().requires_grad_()
    pair = log_distributions(problem, student_TV, temperature=temperature, sparse=target.sparse)
    total = by_definition(name, *pair).sum() / target.scale(problem)
    answer = target.run(problem, **options, **({} if temperature == 1 else {"temperature": temperature}))
    # Both conventions are in use; which one it is follows from the value.
    factor = min((1.0, temperature**2), key=lambda factor: abs(factor * total.item() - answer.value))
    expected, slope_TV = factor * total, torch.autograd.grad(factor * total, student_TV)[0]
    called = f"{name} at temperature {temperature:g}" + (f" x {factor:g}" if factor != 1 else "")
    yield equal(called, expected.item(), answer.value, within=target.close_to(expected.item()))
    apart = (answer.gradient_TV - slope_TV).abs().max().item()
    yield equal(f"{called}: largest difference of gradients", 0.0, apart, within=target.within)


def slope(target: Target) -> Iterator[Comparison]:
    """Its gradient is the slope of its own value, by central differences."""
    target.needs_loss()
    if set(target.divergences) <= set(DETACHED):
        raise NotApplicable("has weights that count as constants: its gradient is not its value's slope")
    problem, (step, within) = draw(81, ignored=(4,)), DIFFERENCES[target.layout.dtype]
    directions = draw(82, spread=1.0)
    settings = [{"alpha": 0.5}] if target.takes("alpha", "labels") else [{}]
    settings += [{"temperature": 2.0}] if target.takes("temperature") else []
    for name, options in target.variants():
        for setting in settings if name not in DETACHED else []:
            gradient_TV = target.run(problem, **setting, **options).gradient_TV
            for direction_TV in (directions.student_TV, directions.teacher_TV):
                ends = [problem.student_TV + side * direction_TV for side in (step, -step)]
                ahead, behind = (target.value(replace(problem, student_TV=z), **setting, **options) for z in ends)
                expected = (ahead - behind) / (2 * step)
                got = (gradient_TV * direction_TV).sum().item()
                yield equal(f"slope of {name}", expected, got, within=within * max(1.0, abs(expected)))


def incoming_gradient(target: Target) -> Iterator[Comparison]:
    """A loss that is scaled afterwards has its gradient scaled."""
    target.needs_loss()
    problem = draw(83)
    once, scaled = target.run(problem), target.run(problem, incoming=2.5)
    apart = (scaled.gradient_TV - 2.5 * once.gradient_TV).abs().max().item()
    yield equal("gradient of 2.5 x loss, difference from 2.5 x gradient", 0.0, apart, within=target.within)


CHECKS = (
    Check("definition", "value and gradient equal the divergence's definition under autograd", definition),
    Check("slope", "its gradient is the slope of its own value", slope),
    Check("incoming_gradient", "a gradient that arrives is multiplied in", incoming_gradient),
)
