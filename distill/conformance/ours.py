"""Our own losses as targets: every path of distill.losses.

    python -m distill.conformance --target distill.conformance.ours:dense --target distill.conformance.ours:fused

Shapes: T tokens, H and G widths of student and teacher, V vocabulary, K classes listed.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from distill.conformance import our_cache
from distill.losses import (
    DenseTargets,
    Distillation,
    LinearTargets,
    SparseTargets,
    distillation_from_logits,
    fused_linear_distillation,
)
from distill.losses.divergences import NAMES
from teachers.targets import Tail

cache = our_cache.head_and_tail
"""What the trainer reads; the other codecs are beside it."""

PATHS = ("dense", "fused", "fused_dense", "sparse", "fused_sparse", "sampled", "fused_sampled")
Loss = Callable[..., Distillation]


def path(**declared: Any) -> Callable[[Loss], Loss]:
    """Say in a path's signature that its `**options` are those of our losses, and declare the rest."""

    def declare(loss: Loss) -> Loss:
        own = [one for one in inspect.signature(loss).parameters.values() if one.kind is not one.VAR_KEYWORD]
        ours = inspect.signature(fused_linear_distillation).parameters.values()
        options = [one for one in ours if one.kind is one.KEYWORD_ONLY]
        loss.__signature__ = inspect.Signature([*own, *options])
        loss.conformance = {"divergence": NAMES} | declared
        return loss

    return declare


@path()
def dense(
    student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor, labels_T: torch.Tensor, **options: Any
) -> Distillation:
    """Logits of both models."""
    return distillation_from_logits(student_logits_TV, labels_T, DenseTargets(teacher_logits_TV), **options)


@path()
def fused(
    student_hidden_TH: torch.Tensor,
    student_head_VH: torch.Tensor,
    teacher_hidden_TG: torch.Tensor,
    teacher_head_VG: torch.Tensor,
    labels_T: torch.Tensor,
    **options: Any,
) -> Distillation:
    """Hidden states and heads of both: what the trainer uses."""
    targets = LinearTargets(teacher_hidden_TG, teacher_head_VG)
    return fused_linear_distillation(student_hidden_TH, student_head_VH, labels_T, targets, **options)


@path()
def fused_dense(
    student_hidden_TH: torch.Tensor,
    student_head_VH: torch.Tensor,
    teacher_logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    **options: Any,
) -> Distillation:
    """A teacher whose head is more than a matrix."""
    targets = DenseTargets(teacher_logits_TV)
    return fused_linear_distillation(student_hidden_TH, student_head_VH, labels_T, targets, **options)


@path()
def sparse(
    student_logits_TV: torch.Tensor,
    teacher_ids_TK: torch.Tensor,
    teacher_probs_TK: torch.Tensor,
    labels_T: torch.Tensor,
    **options: Any,
) -> Distillation:
    """Listed classes and the bucket of the rest, on the student's logits."""
    targets = _listed(teacher_ids_TK, teacher_probs_TK, "bucket", options)
    return distillation_from_logits(student_logits_TV, labels_T, targets, **options)


@path()
def fused_sparse(
    student_hidden_TH: torch.Tensor,
    student_head_VH: torch.Tensor,
    teacher_ids_TK: torch.Tensor,
    teacher_probs_TK: torch.Tensor,
    labels_T: torch.Tensor,
    **options: Any,
) -> Distillation:
    """The same on hidden states and head."""
    targets = _listed(teacher_ids_TK, teacher_probs_TK, "bucket", options)
    return fused_linear_distillation(student_hidden_TH, student_head_VH, labels_T, targets, **options)


@path(divergence="forward_kl", tail="sampled")
def sampled(
    student_logits_TV: torch.Tensor,
    teacher_ids_TK: torch.Tensor,
    teacher_probs_TK: torch.Tensor,
    labels_T: torch.Tensor,
    **options: Any,
) -> Distillation:
    """Sampled classes, on the student's logits."""
    targets = _listed(teacher_ids_TK, teacher_probs_TK, "sampled", options)
    return distillation_from_logits(student_logits_TV, labels_T, targets, **options)


@path(divergence="forward_kl", tail="sampled")
def fused_sampled(
    student_hidden_TH: torch.Tensor,
    student_head_VH: torch.Tensor,
    teacher_ids_TK: torch.Tensor,
    teacher_probs_TK: torch.Tensor,
    labels_T: torch.Tensor,
    **options: Any,
) -> Distillation:
    """The same on hidden states and head."""
    targets = _listed(teacher_ids_TK, teacher_probs_TK, "sampled", options)
    return fused_linear_distillation(student_hidden_TH, student_head_VH, labels_T, targets, **options)


def _listed(ids_TK: torch.Tensor, probs_TK: torch.Tensor, tail: Tail, options: dict[str, Any]) -> SparseTargets:
    """The teacher's own statistics are 0: they shift a sampled loss by a constant and are reported, nothing else."""
    unknown_T = torch.zeros(len(ids_TK), dtype=probs_TK.dtype, device=probs_TK.device)
    return SparseTargets(ids_TK, probs_TK, tail, unknown_T, unknown_T, options.get("temperature", 1.0))
