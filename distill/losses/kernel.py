"""The mathematics of one chunk: logits in; loss, statistics and the gradient of the logits out.

Called by distill.losses.fused for every chunk; all of it is fp32 (or fp64) and without autograd.
Shapes: C tokens of the chunk, V student vocabulary, S statistics of STATS.
loss = (1-a) CE(y', q) + a t^2 D(p_t, q_t) + z (log sum exp)^2; its gradient overwrites the logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from distill.losses.compiled import fused
from distill.losses.divergences import Divergence, forward_kl
from distill.losses.soft_gradient import SoftGradient, bucket_gradient, full_targets_gradient, sampled_gradient
from distill.losses.token_stats import TokenStats
from herd.run.errors import ConfigError
from teachers.targets import SoftTargets, SparseTargets

ASKED = ("teacher_square", "soft_square", "hard_square", "cross")
"""Statistics that cost a pass over the vocabulary: 0 unless the weight asked for them (TokenStats.asked)."""
STATS = ("ce", "kd", "kl", "teacher_ce", "teacher_entropy", "alpha", "absent", *ASKED)
"""`absent` is 1 where there should be a target and is none; what is said of the teacher is 0 there."""


@dataclass(frozen=True)
class LossTerms:
    """What the loss of a token is made of, the same for all tokens."""

    divergence: Divergence = forward_kl
    temperature: float = 1.0
    label_smoothing: float = 0.0
    """Share of the hard target spread over all classes (not those at -inf); the reported CE is the plain one."""
    z_loss: float = 0.0
    """Coefficient of the squared log sum exp (PaLM, 2204.02311), whatever alpha is."""


def mix_chunk(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    valid_C: torch.Tensor,
    teacher: torch.Tensor | SparseTargets | None,
    *,
    alpha: Callable[[TokenStats], torch.Tensor],
    terms: LossTerms,
    absent_C: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [C] and statistics [S, C]; d(loss)/d(logits) [C, V] is written over `logits_CV`.

    `teacher` is the sparse targets of these tokens, or whole logits [C, W], in fp32 and overwritten. Where `absent_C`
    is true there should be a target and is none: the loss is the hard one.

    `labels_C` must be in range everywhere. Loss and statistics are zero where `valid_C` is false; the gradient is left
    to the caller, who scales it without a pass of its own.
    """
    q_CV, hard, soft, teacher_ce_C = fused(_measure, logits_CV)(logits_CV, labels_C, teacher, terms)
    normalizer_C, ce_C, hard_C = hard.normalizer_C, hard.ce_C, hard.value_C
    asked: dict[str, torch.Tensor] = {}
    if soft is None:
        alpha_C, kd_C, kl_C, entropy_C = (torch.zeros_like(ce_C) for _ in range(4))
    else:
        kd_C, kl_C = (x_C + normalizer_C if soft.mixes else x_C for x_C in (soft.value_C, soft.kl_C))
        entropy_C, products = soft.entropy_C, lambda: soft.products(q_CV, labels_C)
        tokens = TokenStats(
            ce_C, teacher_ce_C, kl_C, entropy_C, soft.peak_C, q_CV.shape[1], soft.square, products, asked
        )
        alpha_C = alpha(tokens)
        if absent_C is not None:
            alpha_C = alpha_C.masked_fill(absent_C, 0.0)
    loss_C = _weighted(1 - alpha_C, hard_C) + _weighted(alpha_C, terms.temperature**2 * kd_C)
    if terms.z_loss:
        loss_C = loss_C + terms.z_loss * normalizer_C.square()
    fused(_to_gradient, q_CV)(q_CV, labels_C, hard, alpha_C, soft, terms)
    known = {"ce": ce_C, "kd": kd_C, "kl": kl_C, "teacher_ce": teacher_ce_C, "teacher_entropy": entropy_C}
    stats_SC = _listed(known | {"alpha": alpha_C} | asked, absent_C)
    return loss_C.masked_fill(~valid_C, 0.0), stats_SC.masked_fill_(~valid_C, 0.0)


@dataclass(frozen=True)
class _Hard:
    """The hard half of a chunk."""

    normalizer_C: torch.Tensor
    """The student's log sum exp."""
    ce_C: torch.Tensor
    value_C: torch.Tensor
    """The same with label smoothing."""
    open_CV: torch.Tensor | None
    """1 where the label may be spread to, with label smoothing."""


def _measure(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, teacher: torch.Tensor | SparseTargets | None, terms: LossTerms
) -> tuple[torch.Tensor, _Hard, SoftGradient | None, torch.Tensor]:
    """q, written over the logits; both halves of the loss; the teacher's -log p(label) [C]."""
    label_C, highest_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1), logits_CV.amax(1)
    open_CV, target_C = None, label_C
    if terms.label_smoothing:
        open_CV, mean_C = _open_classes(logits_CV)
        target_C = (1 - terms.label_smoothing) * label_C + terms.label_smoothing * mean_C
    soft, teacher_ce_C = None, torch.zeros_like(label_C)
    if teacher is not None:
        soft, teacher_ce_C = _soft(logits_CV, labels_C, teacher, terms)
    q_CV = torch.softmax(logits_CV, 1, out=logits_CV)
    normalizer_C = highest_C - q_CV.amax(1).log()
    return q_CV, _Hard(normalizer_C, normalizer_C - label_C, normalizer_C - target_C, open_CV), soft, teacher_ce_C


def _open_classes(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 where a class is not ruled out by -inf, else 0; and the mean [C] of the logits a label is spread over."""
    open_CV = logits_CV > -torch.inf
    mean_C = torch.where(open_CV, logits_CV, 0.0).sum(1) / open_CV.sum(1)
    return open_CV.to(logits_CV.dtype), mean_C


def _weighted(weight_C: torch.Tensor, loss_C: torch.Tensor) -> torch.Tensor:
    """Their product; 0 for a loss that has no weight, even if it is infinite."""
    return (weight_C * loss_C).masked_fill_(weight_C == 0, 0.0)


def _soft(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, teacher: torch.Tensor | SparseTargets, terms: LossTerms
) -> tuple[SoftGradient, torch.Tensor]:
    """The soft half of this chunk, and the teacher's own -log p(label) [C] at temperature 1."""
    settings = {"temperature": terms.temperature}
    if isinstance(teacher, SparseTargets):
        probs_CK, entropy_C, teacher_ce_C = (
            x.to(logits_CV.dtype) for x in (teacher.probs_TK, teacher.entropy_T, teacher.ce_T)
        )
        listed = (teacher.ids_TK, probs_CK, entropy_C)
        if teacher.tail == "sampled":
            return sampled_gradient(logits_CV, *listed, **settings), teacher_ce_C
        return bucket_gradient(logits_CV, *listed, divergence=terms.divergence, **settings), teacher_ce_C
    label_C = teacher.gather(1, labels_C[:, None].clamp_max(teacher.shape[1] - 1)).squeeze(1)
    soft, normalizer_C = full_targets_gradient(logits_CV, teacher, divergence=terms.divergence, **settings)
    return soft, normalizer_C - label_C


def inverse(count: torch.Tensor) -> torch.Tensor:
    """1 / count, fp64, and 1 where there is nothing to divide. A step's tokens over ranks and micro-batches may be less
    than one."""
    count = count.double()
    return 1.0 / torch.where(count == 0, 1.0, count)


def check_targets(targets: SoftTargets, terms: LossTerms) -> None:
    """Raise ConfigError for sparse targets that this loss cannot read."""
    if not isinstance(targets, SparseTargets):
        return
    if targets.temperature != terms.temperature:
        raise ConfigError(
            f"temperature = {terms.temperature}: these targets were made at {targets.temperature}, and a few classes "
            "cannot be brought to another; use that one"
        )
    if targets.tail == "sampled" and terms.divergence is not forward_kl:
        raise ConfigError(
            "divergence: sampled targets are an estimate of p that only the forward KL, linear in p, reads without "
            "bias; use forward_kl, or targets with a tail bucket"
        )


def _listed(known: dict[str, torch.Tensor], absent_C: torch.Tensor | None) -> torch.Tensor:
    """[S, C] in the order of STATS, 0 where nothing is known."""
    stats_SC = torch.stack([known[name] if name in known else torch.zeros_like(known["ce"]) for name in STATS])
    if absent_C is not None:
        stats_SC[1:].masked_fill_(absent_C, 0.0)  # the student's own loss, the first row, needs no target
        stats_SC[STATS.index("absent")] = absent_C
    return stats_SC


def _to_gradient(
    q_CV: torch.Tensor,
    labels_C: torch.Tensor,
    hard: _Hard,
    alpha_C: torch.Tensor,
    soft: SoftGradient | None,
    terms: LossTerms,
) -> None:
    """From the probabilities to the gradient of the whole loss, in place.

    (1-a)(q - y') + a u + 2 z lse q. With forward KL at temperature 1 it is q - (a p + (1-a) y'): one pass.
    """
    hard_C = 1 - alpha_C
    mixed = soft is None or soft.mixes
    share_C = (torch.ones_like(alpha_C) if mixed else hard_C) + 2 * terms.z_loss * hard.normalizer_C
    if soft is None:
        if terms.z_loss:
            q_CV.mul_(share_C[:, None])
    else:
        if terms.z_loss or not mixed:
            soft.scale_q(q_CV, share_C, alpha_C)
        soft.add_to(q_CV, alpha_C)
    if terms.label_smoothing:
        spread_C = hard_C / hard.open_CV.sum(1)
        q_CV.addcmul_(hard.open_CV, spread_C[:, None], value=-terms.label_smoothing)
    q_CV.scatter_add_(1, labels_C[:, None], (hard_C * (terms.label_smoothing - 1))[:, None])
