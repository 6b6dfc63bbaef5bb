"""Distillation losses. `fused_linear_distillation` is the one the trainer uses; see its docstring."""

from distill.losses.fused import Distillation, distillation_from_logits, fused_linear_distillation
from distill.losses.token_stats import Alpha, GradientProducts, TokenStats
from teachers.targets import DenseTargets, LinearTargets, SparseTargets

__all__ = [
    "Alpha",
    "DenseTargets",
    "Distillation",
    "GradientProducts",
    "LinearTargets",
    "SparseTargets",
    "TokenStats",
    "distillation_from_logits",
    "fused_linear_distillation",
]
