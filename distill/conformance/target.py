"""A loss under test: what it takes, what was declared or found out about it, and how it is called.

    target = load("my.module:loss")                  # or of(my_loss, "my loss", labels="unshifted")
    answer = target.run(problem, temperature=2.0)    # its value, and its gradient in the student's logits

A loss may carry its own declarations: `loss.conformance = {"labels": "unshifted", "divergence": ("jsd", "tvd")}`.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from distill.conformance import definitions
from distill.conformance.arguments import Layout
from distill.conformance.caller import Caller
from distill.conformance.declarations import DIVERGENCES, Declared
from distill.conformance.problem import Problem, draw
from distill.conformance.signature import read_signature
from herd.run.errors import ConfigError, first_line

WITHIN = {torch.float64: 1e-9, torch.float32: 2e-5}
"""Tolerance of a loss of about one nat."""


@dataclass(frozen=True)
class Answer:
    """What one call gave."""

    value: float
    gradient_TV: torch.Tensor
    """In the student's logits, float64."""


@dataclass(frozen=True)
class Target(Caller):
    """A callable whose precision, layout and divergence are found out when they are not declared."""

    device: str = "cpu"
    importable: bool = False
    """Its name leads another process to it."""

    @cached_property
    def layout(self) -> Layout:
        """Precision and shape: what was declared, else the first that the loss accepts."""
        kinds = [self.declared.layout] if self.declared.layout else ["TV", "BTV"]
        dtypes = [self.declared.dtype] if self.declared.dtype else ["float64", "float32"]
        errors = []
        for layout in (self._layout(kind, dtype) for kind in kinds for dtype in dtypes):
            try:
                exact = self._sees_ten_digits(layout) or layout.dtype == torch.float32
            except Exception as error:
                errors.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                continue
            return layout if exact else self._layout(layout.kind, "float32")
        raise ConfigError(
            f"--target {self.name}: cannot be called with 12 tokens of 11 classes: {errors[0]}; "
            "wrap it in a function that can"
        )

    def _layout(self, kind: str, dtype: str) -> Layout:
        return Layout(kind, self.declared.labels == "unshifted", getattr(torch, dtype), self.device)

    def _sees_ten_digits(self, layout: Layout) -> bool:
        """False for a loss that rounds float64 to less inside: over a step of 1e-10 its slope is then another."""
        problem = draw(0)
        pattern_V = torch.arange(problem.student_TV.shape[1], dtype=torch.float64)
        start = self.call_with(problem, layout, {}).double().item()
        for side in ("student_TV", "teacher_TV"):
            slopes = []
            for step in (1e-6, 1e-10):
                moved = replace(problem, **{side: getattr(problem, side) + step * pattern_V})
                slopes.append((self.call_with(moved, layout, {}).double().item() - start) / step)
            if abs(slopes[0] - slopes[1]) > 0.01 * abs(slopes[0]) + 1e-4:
                return self.declared.dtype is not None
        return True

    @property
    def within(self) -> float:
        """Tolerance that its precision allows, for numbers of about one."""
        return WITHIN[self.layout.dtype]

    def close_to(self, expected: float) -> float:
        """The same for numbers of this size."""
        return self.within * max(1.0, abs(expected))

    def __str__(self) -> str:
        if self.is_cache:
            return f"{self.name}: a cache"
        forms = (
            "hidden states and head" if self.fused else "logits",
            self.declared.tail + " targets" if self.sparse else "whole teachers",
            f"{self.layout.kind} {str(self.layout.dtype).removeprefix('torch.')}",
            f"{self.declared.labels} labels" if self.takes("labels") else "no labels",
            self.declared.reduction,
            ", ".join(self.divergences),
        )
        return f"{self.name}: {'; '.join(forms)}"

    def value(self, problem: Problem, **options: Any) -> float:
        """The loss."""
        return self.call_with(problem, self.layout, options).double().item()

    def run(self, problem: Problem, *, incoming: float = 1.0, **options: Any) -> Answer:
        """The loss and its gradient; alpha and temperature are 1 unless given. `incoming` multiplies the loss later."""
        student_TV = problem.student_TV.clone().requires_grad_()
        loss = self.call_with(replace(problem, student_TV=student_TV), self.layout, options)
        (gradient_TV,) = torch.autograd.grad(loss * incoming, student_TV)
        return Answer(loss.double().item(), gradient_TV)

    @cached_property
    def divergences(self) -> tuple[str, ...]:
        """Declared, else the one it was recognised as, else `unknown`."""
        if self.declared.divergences:
            return self.declared.divergences
        problem = draw(1, spread=1.0)
        log_p_TK, log_q_TK = definitions.log_distributions(
            problem, problem.student_TV, temperature=1.0, sparse=self.sparse
        )
        value = self.value(problem) / (problem.num_valid if self.declared.reduction == "sum" else 1)
        for name in DIVERGENCES:
            if abs(definitions.by_definition(name, log_p_TK, log_q_TK).mean().item() - value) < 10 * self.within:
                return (name,)
        return ("unknown",)

    def variants(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Its divergences, with the option that chooses each; only declared ones are names it surely knows."""
        chooses = self.takes("divergence") and self.declared.divergences
        for name in self.divergences:
            yield name, {"divergence": name} if chooses else {}

    def temperatures(self) -> tuple[float, ...]:
        """Those to try."""
        return (1.0, 2.0) if self.takes("temperature") else (1.0,)

    def scale(self, problem: Problem) -> float:
        """What a sum over valid tokens is divided by."""
        return 1.0 if self.declared.reduction == "sum" else float(problem.num_valid)


def load(spec: str, declared: Mapping[str, Any] | None = None, *, device: str = "cpu") -> Target:
    """The target named module:attribute. Raises ConfigError when there is none, or none that can be called."""
    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise ConfigError(f"--target {spec}: must be module:function, such as my.losses:kd_loss")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"--target {spec}: {error}; run from the folder it is imported from") from error
    except Exception as error:  # whatever a module of the user's does while it is imported
        raise ConfigError(
            f"--target {spec}: {module_name} raises {type(error).__name__}: {first_line(error)}"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"--target {spec}: {module_name} has no {path}")
        found = getattr(found, part)
    return replace(of(found, spec, device=device, **(declared or {})), importable=True)


def of(call: Callable[..., Any], name: str, *, device: str = "cpu", **declared: Any) -> Target:
    """A target of a callable in hand; `declared` wins over what the callable carries in its `conformance`."""
    facts = {**getattr(call, "conformance", {}), **declared}
    return Target(name, call, read_signature(call, name), Declared.of(name, facts), device)
