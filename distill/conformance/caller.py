"""A callable whose arguments are known by name: what it takes, and one call of it.

    caller = Caller(name, call, read_signature(call, name), declared)
    loss = caller.call_with(problem, layout, {"temperature": 2.0})

Shapes: T tokens, V vocabulary, N positions laid out.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distill.conformance.arguments import Layout, factor, labels_of, teacher_of
from distill.conformance.declarations import Declared
from distill.conformance.problem import Problem
from distill.conformance.verdict import NotApplicable
from herd.run.errors import ConfigError


@dataclass(frozen=True)
class Caller:
    """Arguments sorted out, nothing found out by trying."""

    name: str
    function: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]
    """Our name of each argument, and its own."""
    declared: Declared

    def takes(self, *names: str) -> bool:
        """True when it has all these arguments."""
        return set(names) <= self.parameters.keys()

    @property
    def fused(self) -> bool:
        """It makes the student's logits itself."""
        return self.takes("student_hidden", "student_head")

    @property
    def sparse(self) -> bool:
        """It reads a few classes of each token."""
        return self.takes("teacher_ids")

    @property
    def masks(self) -> bool:
        """It can leave tokens out."""
        return self.takes("labels") or self.takes("mask")

    @property
    def is_cache(self) -> bool:
        """It stores targets and computes no loss."""
        return self.takes("input_ids", "teacher_ids") and not (self.fused or self.takes("student_logits"))

    def needs(self, *names: str) -> None:
        """Raise NotApplicable when it lacks one of these arguments."""
        missing = [name for name in names if name not in self.parameters]
        if missing:
            raise NotApplicable(f"takes no {', '.join(missing)}")

    def needs_mask(self) -> None:
        """Raise NotApplicable when it cannot leave tokens out."""
        if not self.masks:
            raise NotApplicable("takes no labels and no mask")

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

    def call_with(self, problem: Problem, layout: Layout, options: dict[str, Any]) -> torch.Tensor:
        """The loss of the problem's own student."""
        logits = layout.lay(problem.student_TV, problem.rows)
        if not self.fused:
            return self.loss({"student_logits": logits}, problem, layout, options)
        hidden, head_VN = factor(logits)
        return self.loss({"student_hidden": hidden, "student_head": head_VN}, problem, layout, options)

    def loss(
        self, student: dict[str, torch.Tensor], problem: Problem, layout: Layout, options: dict[str, Any]
    ) -> torch.Tensor:
        """The scalar it returns for these tensors of the student; alpha and temperature are 1 unless given.

        Raises ConfigError when it returns something else.
        """
        settings = {"alpha": 1.0, "temperature": 1.0, "ignore_index": -100} | options
        tail = self.declared.tail if self.sparse else None
        given = teacher_of(problem, layout, settings["temperature"], tail=tail) | labels_of(problem, layout)
        given |= student | {name: value for name, value in settings.items() if name in self.parameters}
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
        return self.function(*placed, **named)

    def _neutral(self, name: str, student: dict[str, torch.Tensor], problem: Problem) -> Any:
        """A required argument that the check does not care about."""
        if name in ("student_bias", "teacher_bias"):
            width = problem.student_TV.shape[1] if name == "student_bias" else problem.teacher_TV.shape[1]
            return next(iter(student.values())).new_zeros(width)
        choices = {"normalizer": problem.num_valid, "chunk_tokens": len(problem.labels_T), "logit_scale": 1.0}
        return (choices | {"reduction": self.declared.reduction, "softcap": None, "divergence": "forward_kl"})[name]
