"""Distillation losses. `fused_linear_distillation` is the one the trainer uses; see its docstring."""

from distill.losses.fused import (
    Distillation,
    TokenStats,
    distillation_from_logits,
    fused_linear_distillation,
)
from teachers.targets import DenseTargets, LinearTargets

__all__ = [
    "DenseTargets",
    "Distillation",
    "LinearTargets",
    "TokenStats",
    "distillation_from_logits",
    "fused_linear_distillation",
]
