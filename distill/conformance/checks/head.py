"""Losses that multiply hidden states with the head themselves: both gradients, and heads that are more than a matrix.

Shapes: T tokens, H width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from distill.conformance.problem import draw
from distill.conformance.target import Target
from distill.conformance.verdict import Check, Comparison, NotApplicable, equal

SOFTCAP, SCALE = 1.5, 0.6


def hidden_and_head(target: Target) -> Iterator[Comparison]:
    """The gradients of hidden states and head are those of the logits, carried through the product."""
    target.needs_loss()
    target.needs("student_hidden", "student_head")
    problem = draw(90, ignored=(1, 5))
    generator = torch.Generator().manual_seed(90)
    hidden_TH = torch.randn(12, 4, generator=generator, dtype=torch.float64).requires_grad_()
    head_VH = torch.randn(11, 4, generator=generator, dtype=torch.float64).requires_grad_()
    problem = replace(problem, student_TV=(hidden_TH @ head_VH.T).detach())
    options = {"alpha": 0.6} if target.takes("alpha", "labels") else {}
    expected = target.run(problem, **options)
    layout = target.layout
    student = {"student_hidden": layout.lay(hidden_TH, 1), "student_head": head_VH.to(layout.device, layout.dtype)}
    loss = target.loss(student, problem, layout, options)
    yield equal("loss", expected.value, loss.item(), within=target.close_to(expected.value))
    for_hidden_TH, for_head_VH = torch.autograd.grad(loss, (hidden_TH, head_VH))
    apart = for_hidden_TH - expected.gradient_TV @ head_VH
    yield equal("gradient of hidden states, difference", 0.0, apart.abs().max().item(), within=target.within)
    apart = for_head_VH - expected.gradient_TV.T @ hidden_TH
    yield equal("gradient of the head, difference", 0.0, apart.abs().max().item(), within=target.within)


def more_than_a_matrix(target: Target) -> Iterator[Comparison]:
    """Soft cap, logit scale and bias that the loss takes are applied: it equals the loss of the model's own logits."""
    target.needs_loss()
    cases = [(name, *case) for name, case in _transforms(target).items() if target.takes(name)]
    if not cases:
        raise NotApplicable("takes no softcap, logit_scale or student_bias: give it plain heads only")
    problem = draw(91)
    for name, setting, forward in cases:
        own = replace(problem, student_TV=forward(problem.student_TV))
        neutral = {"softcap": None, "logit_scale": 1.0}.get(name, torch.zeros_like(_bias(target)))
        expected = target.value(own, **{name: neutral})
        got = target.value(problem, **{name: setting})
        yield equal(f"with {name}, against the model's logits", expected, got, within=target.close_to(expected))


def _transforms(target: Target) -> dict[str, tuple[Any, Any]]:
    """Setting, and what it does to logits that a student makes."""
    bias_V = _bias(target)
    return {
        "softcap": (SOFTCAP, lambda logits: SOFTCAP * torch.tanh(logits / SOFTCAP)),
        "logit_scale": (SCALE, lambda logits: SCALE * logits),
        "student_bias": (bias_V, lambda logits: logits + bias_V.double().cpu()),
    }


def _bias(target: Target) -> torch.Tensor:
    return torch.linspace(-1, 1, 11, dtype=torch.float64).to(target.device, target.layout.dtype)


CHECKS = (
    Check(
        "hidden_and_head", "gradients of hidden states and head are the logits', through the product", hidden_and_head
    ),
    Check(
        "more_than_a_matrix",
        "soft cap, logit scale and bias are applied as the model applies them",
        more_than_a_matrix,
        (17,),
        "TRL #6629: the fused path ignored the model's soft cap",
    ),
)
