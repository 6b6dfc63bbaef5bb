"""A loss under test: what it takes, what was declared or found out about it, and how it is called.

    target = load("my.module:loss")                  # or of(my_loss, "my loss", labels="unshifted")
    answer = target.run(problem, temperature=2.0)    # its value, and its gradient in the student's logits

A loss may carry its own declarations: `loss.conformance = {"labels": "unshifted", "divergence": ("jsd", "tvd")}`.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from distill.conformance import definitions
from distill.conformance.arguments import Layout, factor, labels_of, teacher_of
from distill.conformance.declarations import DIVERGENCES, Declared
from distill.conformance.problem import Problem, draw
from distill.conformance.signature import read_signature
from distill.conformance.verdict import NotApplicable
from herd.run.errors import ConfigError

WITHIN = {torch.float64: 1e-9, torch.float32: 2e-5}
"""Tolerance of a loss of about one nat."""


@dataclass(frozen=True)
class Answer:
    """What one call gave."""

    value: float
    gradient_TV: torch.Tensor
    """In the student's logits, float64."""


@dataclass(frozen=True)
class Target:
    """A callable with its arguments sorted out."""

    name: str
    call: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]
    declared: Declared
    device: str = "cpu"
    importable: bool = False
    """Its name leads another process to it."""

    def takes(self, *names: str) -> bool:
        """True when it has all these arguments."""
        return set(names) <= self.parameters.keys()

    def needs(self, *names: str) -> None:
        """Raise NotApplicable when it lacks one of these arguments."""
        missing = [name for name in names if name not in self.parameters]
        if missing:
            raise NotApplicable(f"takes no {', '.join(missing)}")

    @property
    def is_cache(self) -> bool:
        """It stores targets and computes no loss."""
        return self.takes("input_ids", "teacher_ids") and not self.takes("student_logits")

    @property
    def fused(self) -> bool:
        """It makes the student's logits itself."""
        return self.takes("student_hidden", "student_head")

    @property
    def sparse(self) -> bool:
        """It reads a few classes of each token."""
        return self.takes("teacher_ids")

    def needs_loss(self, *, sampled: bool | None = None, sparse: bool | None = None) -> None:
        """Raise NotApplicable for caches, and for other targets than asked for."""
        if self.is_cache:
            raise NotApplicable("is a cache, no loss")
        if sparse and not self.sparse:
            raise NotApplicable("takes whole teachers: no teacher_ids")
        if sampled is False and self.declared.tail == "sampled":
            raise NotApplicable("reads samples: one draw is an estimate, which need not obey this")
        if sampled and self.declared.tail != "sampled":
            raise NotApplicable("reads no samples; declare tail=sampled if it should")

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
        start = self._call(problem, layout, {}).double().item()
        for side in ("student_TV", "teacher_TV"):
            slopes = []
            for step in (1e-6, 1e-10):
                moved = replace(problem, **{side: getattr(problem, side) + step * pattern_V})
                slopes.append((self._call(moved, layout, {}).double().item() - start) / step)
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
        return self._call(problem, self.layout, options).double().item()

    def run(self, problem: Problem, *, incoming: float = 1.0, **options: Any) -> Answer:
        """The loss and its gradient; alpha and temperature are 1 unless given. `incoming` multiplies the loss later."""
        student_TV = problem.student_TV.clone().requires_grad_()
        loss = self._call(replace(problem, student_TV=student_TV), self.layout, options)
        (gradient_TV,) = torch.autograd.grad(loss * incoming, student_TV)
        return Answer(loss.double().item(), gradient_TV)

    def _call(self, problem: Problem, layout: Layout, options: dict[str, Any]) -> torch.Tensor:
        """The loss of the problem's own student."""
        logits = layout.lay(problem.student_TV, problem.rows)
        if not self.fused:
            return self.loss({"student_logits": logits}, problem, layout, options)
        hidden, head_VN = factor(logits)
        return self.loss({"student_hidden": hidden, "student_head": head_VN}, problem, layout, options)

    def loss(
        self, student: dict[str, torch.Tensor], problem: Problem, layout: Layout, options: dict[str, Any]
    ) -> torch.Tensor:
        """The scalar it returns for these tensors of the student. Raises ConfigError when it returns something else."""
        temperature = options.get("temperature", 1.0)
        settings = {"alpha": 1.0, "temperature": temperature, "ignore_index": -100} | options
        tail = self.declared.tail if self.sparse else None
        given = student | teacher_of(problem, layout, temperature, tail=tail) | labels_of(problem, layout)
        given |= {name: value for name, value in settings.items() if name in self.parameters}
        for name in self.parameters.keys() - given.keys():
            if self.parameters[name].default is inspect.Parameter.empty:
                given[name] = self._neutral(name, student, problem)
        out = self._invoke(given)
        out = getattr(out, "loss", out)
        if not isinstance(out, torch.Tensor) or out.numel() != 1:
            shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ConfigError(f"--target {self.name}: returned {shape}; return a scalar, or an object with .loss")
        return out.reshape(())

    def _invoke(self, given: dict[str, Any]) -> Any:
        chosen = [(one, given[ours]) for ours, one in self.parameters.items() if ours in given]
        placed = [value for one, value in chosen if one.kind is inspect.Parameter.POSITIONAL_ONLY]
        named = {one.name: value for one, value in chosen if one.kind is not inspect.Parameter.POSITIONAL_ONLY}
        return self.call(*placed, **named)

    def _neutral(self, name: str, student: dict[str, torch.Tensor], problem: Problem) -> Any:
        """A required argument that the check does not care about."""
        if name in ("student_bias", "teacher_bias"):
            width = problem.student_TV.shape[1] if name == "student_bias" else problem.teacher_TV.shape[1]
            return next(iter(student.values())).new_zeros(width)
        choices = {"normalizer": problem.num_valid, "chunk_tokens": len(problem.labels_T), "logit_scale": 1.0}
        choices |= {"reduction": self.declared.reduction, "softcap": None, "divergence": self.divergences[0]}
        return choices[name]

    @cached_property
    def divergences(self) -> tuple[str, ...]:
        """Declared, else the default of its argument, else the one it was recognised as; `other` when unknown."""
        if self.declared.divergences:
            return self.declared.divergences
        if self.takes("divergence"):
            default = self.parameters["divergence"].default
            return (default if default in DIVERGENCES else "other",)
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
        """Its divergences, with the option that chooses each."""
        for name in self.divergences:
            chooses = self.takes("divergence") and name in DIVERGENCES
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
    for part in path.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"--target {spec}: {module_name} has no {path}")
        found = getattr(found, part)
    return replace(of(found, spec, device=device, **(declared or {})), importable=True)


def of(call: Callable[..., Any], name: str, *, device: str = "cpu", **declared: Any) -> Target:
    """A target of a callable in hand; `declared` wins over what the callable carries in its `conformance`."""
    facts = {**getattr(call, "conformance", {}), **declared}
    return Target(name, call, read_signature(call, name), Declared.of(name, facts), device)
