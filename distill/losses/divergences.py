"""Divergences between a teacher p and a student q: value per token, and gradient with respect to the student's logits.

    value_C, gradient_CK = divergence("jsd", 0.3)(log_q_CK, log_p_CK)

Shapes: C tokens, K classes (the vocabulary, or a few classes and the bucket of all others). Both inputs are normalised,
may hold -inf and may be overwritten. All are >= 0, 0 at q = p, and unchanged when a constant is added to all logits.
"""

from collections.abc import Callable
from functools import partial

import torch

from herd.run.errors import ConfigError
from teachers.targets import LEAST_LOGIT

Divergence = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

FLOOR = -50.0
"""Least log p where p stands in a denominator: a class the teacher rules out costs a student 50 nats, not infinity."""
LARGEST_LOG_RATIO = 80.0
"""exp of it is finite in fp32. Beyond it the class has no mass on the side that the ratio multiplies."""

PARAMETERS = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1, "adaptive_kl": 0.5}
"""Default of the one parameter: jsd's weight of the teacher, the share mixed in, the teacher mass that is the head."""

NAMES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl", "tvd")


def divergence(name: str, parameter: float | None = None) -> Divergence:
    """The named divergence. Raises ConfigError for an unknown name, or a parameter it does not have or allow."""
    if name not in NAMES:
        raise ConfigError(f"divergence = {name}: unknown; use one of {', '.join(NAMES)}")
    if name not in PARAMETERS:
        if parameter is not None:
            raise ConfigError(f"parameter = {parameter}: {name} has none; leave it out")
        return {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "tvd": total_variation}[name]
    value = PARAMETERS[name] if parameter is None else parameter
    if not 0 <= value <= 1:
        raise ConfigError(f"parameter = {value}: that of {name} must be in [0, 1]")
    if name == "adaptive_kl":
        return partial(adaptive_kl, head_mass=value)
    if name == "jsd":
        return {0.0: forward_kl, 1.0: reverse_kl}.get(value, partial(jensen_shannon, beta=value))
    if value == 1:
        raise ConfigError(f"parameter = {value}: {name} is zero everywhere at 1; use less")
    if value == 0:
        return forward_kl if name == "skew_kl" else reverse_kl
    return partial(skew_kl if name == "skew_kl" else skew_reverse_kl, skew=value)


def expectation(p_CK: torch.Tensor, x_CK: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of p x [C], where a class without mass counts 0 even if its x is infinite. `out` may be overwritten."""
    if torch.compiler.is_compiling() or p_CK.is_cuda:  # one fused pass; and a device is not waited for
        return torch.where(p_CK == 0, 0.0, p_CK * x_CK).sum(1)
    products_CK = torch.mul(p_CK, x_CK, out=out)
    sum_C = products_CK.sum(1)
    # Hardly any logits hold -inf: only where they do is a pass spent on them.
    return products_CK.masked_fill_(p_CK == 0, 0.0).sum(1) if sum_C.isnan().any() else sum_C


def forward_kl(log_q_CK: torch.Tensor, log_p_CK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q), infinite where q rules out a class that p does not; gradient q - p."""
    p_CK = log_p_CK.exp()
    value_C = expectation(p_CK, log_p_CK.clamp_min_(torch.finfo(p_CK.dtype).min).sub_(log_q_CK), out=log_p_CK)
    return value_C, log_q_CK.exp_().sub_(p_CK)


def reverse_kl(log_q_CK: torch.Tensor, log_p_CK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q || p); gradient q (log q/p - KL)."""
    ratio_CK = log_p_CK.clamp_min_(FLOOR).sub_(log_q_CK.clamp_min_(LEAST_LOGIT)).neg_()
    q_CK = log_q_CK.exp_()
    value_C = torch.linalg.vecdot(q_CK, ratio_CK)
    return value_C, ratio_CK.sub_(value_C[:, None]).mul_(q_CK)


def jensen_shannon(log_q_CK: torch.Tensor, log_p_CK: torch.Tensor, *, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[b KL(p || m) + (1 - b) KL(q || m)] / (b (1 - b)) with m = b p + (1 - b) q, b strictly inside (0, 1).

    The generalised Jensen-Shannon divergence (GKD, 2306.13649), divided so that it runs continuously from the forward
    KL at b = 0 to the reverse KL at b = 1. log q/m = -log1p(b (p/q - 1)) keeps its digits at both ends.
    """
    p_CK, ratio_CK = log_p_CK.exp(), log_p_CK.sub_(log_q_CK.clamp_min_(LEAST_LOGIT))
    q_CK = log_q_CK.exp_()
    student_CK = ratio_CK.clamp_max(LARGEST_LOG_RATIO).expm1_().mul_(beta).log1p_().div_(-beta)
    teacher_CK = ratio_CK.neg_().clamp_max_(LARGEST_LOG_RATIO).expm1_().mul_(1 - beta).log1p_().div_(beta - 1)
    mean_C = torch.linalg.vecdot(q_CK, student_CK)
    value_C = torch.linalg.vecdot(p_CK, teacher_CK) + mean_C
    return value_C, student_CK.sub_(mean_C[:, None]).mul_(q_CK)


def skew_kl(log_q_CK: torch.Tensor, log_p_CK: torch.Tensor, *, skew: float) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || s p + (1 - s) q), bounded by -log s (DistiLLM, 2402.03898)."""
    p_CK, ratio_CK = log_p_CK.exp(), log_p_CK.sub_(log_q_CK.clamp_min_(LEAST_LOGIT))
    q_CK = log_q_CK.exp_()
    surprise_CK = ratio_CK.neg_().clamp_max_(LARGEST_LOG_RATIO).expm1_().mul_(1 - skew).log1p_().neg_()
    value_C = torch.linalg.vecdot(p_CK, surprise_CK)
    pull_CK = surprise_CK.exp_().mul_(q_CK).mul_(skew - 1)
    return value_C, pull_CK.sub_(q_CK.mul_(pull_CK.sum(1, keepdim=True)))


def skew_reverse_kl(
    log_q_CK: torch.Tensor, log_p_CK: torch.Tensor, *, skew: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q || s q + (1 - s) p), the student in the mixture differentiated too (DistiLLM-2's code detaches it)."""
    ratio_CK = log_p_CK.sub_(log_q_CK.clamp_min_(LEAST_LOGIT))
    q_CK = log_q_CK.exp_()
    surprise_CK = ratio_CK.clamp_max_(LARGEST_LOG_RATIO).expm1_().mul_(1 - skew).log1p_().neg_()
    value_C = torch.linalg.vecdot(q_CK, surprise_CK)
    slope_CK = surprise_CK.sub_(surprise_CK.exp(), alpha=skew)
    return value_C, through_softmax(q_CK, slope_CK)


def adaptive_kl(
    log_q_CK: torch.Tensor, log_p_CK: torch.Tensor, *, head_mass: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and reverse KL, weighted by how much p and q differ on the teacher's head and on its tail.

    The head is the teacher's most likely classes up to `head_mass`, at least one (AKL, COLING 2025). The weights are
    constants to the gradient.
    """
    p_CK = log_p_CK.exp()
    distance_CK = (log_q_CK.exp() - p_CK).abs_()
    order_CK = p_CK.argsort(dim=1, descending=True, stable=True)
    head_CK = p_CK.gather(1, order_CK).cumsum_(1) <= head_mass
    head_CK[:, 0] = True
    head_C = distance_CK.gather(1, order_CK).mul_(head_CK).sum(1)
    both_C = distance_CK.sum(1)
    share_C = torch.where(both_C > 0, head_C / both_C.clamp_min(torch.finfo(both_C.dtype).tiny), 0.5)
    forward_C, forward_CK = forward_kl(log_q_CK.clone(), log_p_CK.clone())
    reverse_C, reverse_CK = reverse_kl(log_q_CK, log_p_CK)
    return torch.lerp(reverse_C, forward_C, share_C), torch.lerp(reverse_CK, forward_CK, share_C[:, None])


def total_variation(log_q_CK: torch.Tensor, log_p_CK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the sum of |p - q|; its square is at most half the KL (Pinsker)."""
    q_CK = log_q_CK.exp_()
    difference_CK = log_p_CK.exp_().sub_(q_CK).neg_()
    value_C = difference_CK.abs().sum(1) / 2
    return value_C, through_softmax(q_CK, difference_CK.sign_().div_(2))


def through_softmax(q_CK: torch.Tensor, slope_CK: torch.Tensor) -> torch.Tensor:
    """q (g - sum q g): from the slope g in q to the gradient in the logits, in place of the slope."""
    return slope_CK.sub_(torch.linalg.vecdot(q_CK, slope_CK)[:, None]).mul_(q_CK)
