"""The mathematics of one chunk: logits in, loss statistics and the gradient of the logits out.

Called by distill.losses.fused for every chunk; all of it is fp32 and without autograd.
Shapes: C tokens of the chunk, V student vocabulary, W shared vocabulary (min of student's and teacher's).
Maths: (1-a) CE(y,q) + a t^2 KL(p_t || q_t); gradient (1-a)(q - e_y) + a t (q_t - p_t)  (Hinton 1503.02531).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenStats:
    """What a weight may look at, token by token: all [C], fp32, without gradient."""

    student_ce: torch.Tensor
    """-log q(label), nats."""
    teacher_ce: torch.Tensor
    """-log p(label), nats; 0 without a teacher."""
    teacher_entropy: torch.Tensor
    """H(p), nats; 0 without a teacher."""


Alpha = float | torch.Tensor | Callable[[TokenStats], torch.Tensor]
"""Weight of the soft target: one number, one per token [T], or a function of the tokens' statistics."""

STATS = ("ce", "kd", "teacher_ce", "teacher_entropy", "alpha")


def soft_divergence(
    logits_CV: torch.Tensor,
    teacher_CW: torch.Tensor,
    normalizer_C: torch.Tensor,
    teacher_normalizer_C: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL(p_t || q_t) and H(p_t), both [C], and p_t [C, W]. `teacher_CW` is overwritten.

    The normalisers are log sum exp of both at temperature 1. The student may have more classes than the teacher: the
    teacher's mass there is zero, the student's is not.
    """
    if temperature != 1.0:
        teacher_CW.div_(temperature)
        logits_CV = logits_CV / temperature
        normalizer_C, teacher_normalizer_C = logits_CV.logsumexp(1), teacher_CW.logsumexp(1)
    teacher_CW.sub_(teacher_normalizer_C[:, None])
    probability_CW = teacher_CW.exp()
    entropy_C = -torch.linalg.vecdot(probability_CW, teacher_CW)
    shared_CW = logits_CV[:, : probability_CW.shape[1]]
    kd_C = normalizer_C - entropy_C - torch.linalg.vecdot(probability_CW, shared_CW)
    return kd_C, entropy_C, probability_CW


def mix_chunk(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    valid_C: torch.Tensor,
    teacher_CV: torch.Tensor | None,
    *,
    alpha: Callable[[TokenStats], torch.Tensor],
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics [5, C] in the order of STATS, and d(loss)/d(logits) [C, V] written over `logits_CV`.

    `labels_C` must be in range everywhere; where `valid_C` is false statistics and gradient are zero.
    """
    normalizer_C = logits_CV.logsumexp(1)
    student_ce_C = normalizer_C - logits_CV.gather(1, labels_C[:, None]).squeeze(1)
    if teacher_CV is None:
        zeros_C = torch.zeros_like(student_ce_C)
        kd_C, teacher_ce_C, entropy_C, alpha_C = zeros_C, zeros_C, zeros_C, zeros_C
        gradient_CV = logits_CV.sub_(normalizer_C[:, None]).exp_()
        gradient_CV.scatter_add_(1, labels_C[:, None], -torch.ones_like(labels_C, dtype=gradient_CV.dtype)[:, None])
    else:
        shared = min(logits_CV.shape[1], teacher_CV.shape[1])
        teacher_CW = teacher_CV[:, :shared].to(logits_CV.dtype, copy=True)
        teacher_normalizer_C = teacher_CW.logsumexp(1)
        teacher_ce_C = teacher_normalizer_C - teacher_CW.gather(1, labels_C[:, None].clamp_max(shared - 1)).squeeze(1)
        kd_C, entropy_C, probability_CW = soft_divergence(
            logits_CV, teacher_CW, normalizer_C, teacher_normalizer_C, temperature
        )
        del teacher_CW
        alpha_C = alpha(TokenStats(student_ce_C, teacher_ce_C, entropy_C))
        gradient_CV = _mixed_gradient(
            logits_CV, labels_C, probability_CW, alpha_C[:, None], temperature, normalizer_C[:, None]
        )
    gradient_CV.mul_(valid_C[:, None])
    stats_SC = torch.stack((student_ce_C, kd_C, teacher_ce_C, entropy_C, alpha_C)).mul_(valid_C)
    return stats_SC, gradient_CV


def _mixed_gradient(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    probability_CW: torch.Tensor,
    alpha_C1: torch.Tensor,
    temperature: float,
    normalizer_C1: torch.Tensor,
) -> torch.Tensor:
    """(1-a)(q - e_y) + a t (q_t - p_t), in place of the logits; at t = 1 it is q - (a p + (1-a) e_y)."""
    shared = probability_CW.shape[1]
    if temperature == 1.0:
        gradient_CV = logits_CV.sub_(normalizer_C1).exp_()
    else:
        soft_CV = torch.softmax(logits_CV / temperature, dim=1).mul_(alpha_C1 * temperature)
        gradient_CV = logits_CV.sub_(normalizer_C1).exp_().mul_(1 - alpha_C1).add_(soft_CV)
    gradient_CV[:, :shared].sub_(probability_CW.mul_(alpha_C1 * temperature))
    return gradient_CV.scatter_add_(1, labels_C[:, None], (alpha_C1 - 1).to(gradient_CV.dtype))
