"""The soft half of one chunk's loss: its value, and its gradient in a form that costs no extra [C, V] tensor.

    soft, _ = full_targets_gradient(logits_CV, teacher_CW, ...)       # or bucket_gradient, sampled_gradient
    soft.add_to(gradient_CV, weight_C)

gradient = factor q + sign dense + sparse values at their classes, q the student's probabilities at temperature 1.
Shapes: C tokens, V student vocabulary, W shared vocabulary, K listed classes.
"""

from dataclasses import dataclass

import torch

from distill.losses.divergences import Divergence, expectation, forward_kl
from distill.losses.token_stats import GradientProducts

LEAST_BUCKET = -100.0
"""Least log q of a bucket: where it is empty, rounding in the teacher's rest must not be multiplied by infinity."""


@dataclass(frozen=True)
class SoftGradient:
    """One chunk. The gradient is temperature^2 times the divergence's."""

    value_C: torch.Tensor
    """The divergence, without the student's log sum exp where `mixes`."""
    kl_C: torch.Tensor
    """Forward KL, whatever the divergence is; the same tensor where it is that."""
    entropy_C: torch.Tensor
    """Of the teacher, at the loss's temperature, nats."""
    peak_C: torch.Tensor
    """Largest p."""
    square_C: torch.Tensor | None
    """Sum of p^2; None: `dense_CW` holds p."""
    mixes: bool = False
    """Forward KL at temperature 1, q - p: soft and hard target are one mixed target, and q counts once."""
    factor_C: torch.Tensor | None = None
    """Multiple of q in the gradient of the classes that are not listed (a bucket's); None is 0."""
    dense_CW: torch.Tensor | None = None
    sign: float = 1.0
    ids_CK: torch.Tensor | None = None
    """Slots that are not used repeat the first one, with value 0."""
    values_CK: torch.Tensor | None = None
    used_CK: torch.Tensor | None = None

    def scale_q(self, q_CV: torch.Tensor, share_C: torch.Tensor, weight_C: torch.Tensor) -> None:
        """q becomes share q, plus weight times the multiple of it outside the listed classes."""
        if self.factor_C is None:
            q_CV.mul_(share_C[:, None])
            return
        # A factor can be large where the student's bucket is nearly empty: listed classes must not pass through it.
        listed_CK = q_CV.gather(1, self.ids_CK) * self.used_CK * share_C[:, None]
        q_CV.scatter_(1, self.ids_CK, 0.0).mul_((share_C + weight_C * self.factor_C)[:, None])
        q_CV.scatter_add_(1, self.ids_CK, listed_CK)

    def add_to(self, gradient_CV: torch.Tensor, weight_C: torch.Tensor) -> None:
        """Add weight times everything that is no multiple of q."""
        if self.dense_CW is not None:
            shared_CW = gradient_CV[:, : self.dense_CW.shape[1]]
            shared_CW.addcmul_(self.dense_CW, weight_C[:, None], value=self.sign)
        if self.ids_CK is not None:
            gradient_CV.scatter_add_(1, self.ids_CK, self.values_CK * weight_C[:, None])

    def square(self) -> torch.Tensor:
        return torch.linalg.vecdot(self.dense_CW, self.dense_CW) if self.square_C is None else self.square_C

    def products(self, q_CV: torch.Tensor, labels_C: torch.Tensor) -> GradientProducts:
        """u.u, v.v and u.v with v = q - e_label, from inner products of the parts."""
        at_C1 = labels_C[:, None]
        q_square_C, q_label_C = _dot(q_CV, q_CV), q_CV.gather(1, at_C1).squeeze(1)
        hard_C = (q_square_C - 2 * q_label_C + 1).clamp_min(0)
        # u is a multiple of q, plus a dense part, plus a sparse one.
        factor_C = torch.full_like(q_label_C, float(self.mixes))
        soft_C, with_q_C, at_label_C = factor_C * q_square_C, factor_C * q_square_C, factor_C * q_label_C
        if self.dense_CW is not None:
            width = self.dense_CW.shape[1]
            dense_q_C = self.sign * _dot(self.dense_CW, q_CV[:, :width])
            label_C = self.dense_CW.gather(1, at_C1.clamp_max(width - 1)).squeeze(1)
            soft_C = soft_C + _dot(self.dense_CW, self.dense_CW) + 2 * factor_C * dense_q_C
            with_q_C = with_q_C + dense_q_C
            at_label_C = at_label_C + self.sign * torch.where(labels_C < width, label_C, 0.0)
        if self.ids_CK is not None:
            listed_q_CK, is_label_CK = q_CV.gather(1, self.ids_CK), self.ids_CK == at_C1
            sparse_q_C = _dot(self.values_CK, listed_q_CK)
            soft_C = soft_C + _dot(self.values_CK, self.values_CK) + 2 * factor_C * sparse_q_C
            if self.dense_CW is not None:
                soft_C = soft_C + 2 * self.sign * _dot(self.values_CK, self.dense_CW.gather(1, self.ids_CK))
            with_q_C = with_q_C + sparse_q_C
            at_label_C = at_label_C + (self.values_CK * is_label_CK).sum(1)
        if self.factor_C is not None:
            outside_C = _dot(q_CV.scatter_(1, self.ids_CK, 0.0), q_CV)
            q_CV.scatter_(1, self.ids_CK, listed_q_CK)
            soft_C = soft_C + self.factor_C.square() * outside_C
            with_q_C = with_q_C + self.factor_C * outside_C
            at_label_C = at_label_C + torch.where(is_label_CK.any(1), 0.0, self.factor_C * q_label_C)
        return GradientProducts(soft_C.clamp_min(0), hard_C, with_q_C - at_label_C)


def _dot(left_CN: torch.Tensor, right_CN: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(left_CN, right_CN)


def full_targets_gradient(
    logits_CV: torch.Tensor, teacher_CW: torch.Tensor, *, divergence: Divergence, temperature: float
) -> tuple[SoftGradient, torch.Tensor]:
    """From whole, finite teacher logits, which are overwritten; and the teacher's log sum exp [C] at temperature 1.

    The student may have more classes than the teacher: the teacher's mass there is zero, the student's is not.
    """
    if divergence is forward_kl and temperature == 1.0:
        return _mixed_target(logits_CV, teacher_CW)
    normalizer_C = teacher_CW.logsumexp(1)
    log_p_CW = torch.log_softmax(teacher_CW.div_(temperature), 1)
    p_CW = log_p_CW.exp()
    entropy_C = -torch.mul(p_CW, log_p_CW, out=teacher_CW).sum(1)
    log_q_CV = torch.log_softmax(logits_CV if temperature == 1.0 else logits_CV / temperature, 1)
    kl_C = -entropy_C - expectation(p_CW, log_q_CV[:, : p_CW.shape[1]], out=teacher_CW)
    peak_C, square_C = p_CW.amax(1), torch.mul(p_CW, p_CW, out=p_CW).sum(1)
    del p_CW
    value_C, gradient_CV = divergence(log_q_CV, widened(log_p_CW, log_q_CV.shape[1]))
    gradient_CV.mul_(temperature)
    return SoftGradient(value_C, kl_C, entropy_C, peak_C, square_C, dense_CW=gradient_CV), normalizer_C


def _mixed_target(logits_CV: torch.Tensor, teacher_CW: torch.Tensor) -> tuple[SoftGradient, torch.Tensor]:
    """The default's short way: every pass over the vocabulary counts. softmax is one fused pass, logsumexp four."""
    highest_C = teacher_CW.amax(1)
    p_CW = torch.softmax(teacher_CW, 1)
    peak_C = p_CW.amax(1)
    normalizer_C = highest_C - peak_C.log()
    entropy_C = normalizer_C - teacher_CW.mul_(p_CW).sum(1)
    followed_C = expectation(p_CW, logits_CV[:, : p_CW.shape[1]], out=teacher_CW)
    value_C = -entropy_C - followed_C
    soft = SoftGradient(value_C, value_C, entropy_C, peak_C, None, mixes=True, dense_CW=p_CW, sign=-1.0)
    return soft, normalizer_C


def widened(log_p_CW: torch.Tensor, width: int) -> torch.Tensor:
    """The teacher's log-probabilities over the student's vocabulary: what it does not have is ruled out."""
    if log_p_CW.shape[1] == width:
        return log_p_CW
    return torch.nn.functional.pad(log_p_CW, (0, width - log_p_CW.shape[1]), value=-torch.inf)


def sampled_gradient(
    logits_CV: torch.Tensor,
    ids_CK: torch.Tensor,
    probs_CK: torch.Tensor,
    entropy_C: torch.Tensor,
    *,
    temperature: float,
) -> SoftGradient:
    """Forward KL to masses that sum to one and estimate p without bias: so do value and gradient.

    The value takes the teacher's entropy as stored, so one draw of it may be below 0.
    """
    ids_CK = ids_CK.clamp_min(0)
    peak_C, square_C = probs_CK.amax(1), probs_CK.square().sum(1)
    listed_C = expectation(probs_CK, logits_CV.gather(1, ids_CK)) / temperature
    sparse = {"ids_CK": ids_CK, "values_CK": probs_CK * -temperature}
    if temperature == 1.0:
        value_C = -listed_C - entropy_C
        return SoftGradient(value_C, value_C, entropy_C, peak_C, square_C, mixes=True, **sparse)
    scaled_CV = logits_CV / temperature
    value_C = scaled_CV.logsumexp(1) - listed_C - entropy_C
    dense_CV = torch.softmax(scaled_CV, 1, out=scaled_CV).mul_(temperature)
    return SoftGradient(value_C, value_C, entropy_C, peak_C, square_C, dense_CW=dense_CV, **sparse)


def bucket_gradient(
    logits_CV: torch.Tensor,
    ids_CK: torch.Tensor,
    probs_CK: torch.Tensor,
    entropy_C: torch.Tensor,
    *,
    divergence: Divergence,
    temperature: float,
) -> SoftGradient:
    """Any divergence between the listed classes and one bucket of all others, never more than the whole one.

    `ids_CK` is -1 in unused slots. A class j of the bucket gets the bucket's gradient times q_j / q_bucket. The
    student's bucket is a log sum exp over the classes in it: 1 minus the listed mass would lose its digits.
    """
    used_CK = ids_CK >= 0
    used_CK[:, 0] = True  # of a token without target: its weight is 0
    ids_CK = torch.where(used_CK, ids_CK, ids_CK[:, :1]).clamp_min_(0)
    # The listed classes are taken out of the logits for one log sum exp, and put back: no copy of the chunk.
    raw_CK = logits_CV.gather(1, ids_CK)
    others_CV = logits_CV.scatter_(1, ids_CK, -torch.inf)
    bucket_C1 = (others_CV if temperature == 1.0 else others_CV / temperature).logsumexp(1, keepdim=True)
    logits_CV.scatter_(1, ids_CK, raw_CK)
    listed_CK = (raw_CK / temperature).masked_fill_(~used_CK, -torch.inf)
    log_q_CK = torch.cat((listed_CK, bucket_C1), 1).log_softmax(1)
    log_q_CK[:, -1].clamp_min_(LEAST_BUCKET)
    rest_C1 = (1 - probs_CK.sum(1, keepdim=True)).clamp_min_(0)
    log_p_CK = torch.cat((probs_CK, rest_C1), 1).log()
    bucket_C = log_q_CK[:, -1].exp()
    kl_C, _ = forward_kl(log_q_CK.clone(), log_p_CK.clone())
    value_C, gradient_CK = divergence(log_q_CK, log_p_CK)
    factor_C = gradient_CK[:, -1] / bucket_C.clamp_min(torch.finfo(bucket_C.dtype).tiny)
    sparse = {
        "ids_CK": ids_CK,
        "values_CK": gradient_CK[:, :-1].masked_fill(~used_CK, 0.0).mul_(temperature),
        "used_CK": used_CK,
    }
    peak_C, square_C = probs_CK.amax(1), probs_CK.square().sum(1)
    if temperature == 1.0:
        return SoftGradient(value_C, kl_C, entropy_C, peak_C, square_C, factor_C=factor_C, **sparse)
    dense_CV = (logits_CV / temperature).softmax(1).mul_(factor_C[:, None] * temperature).scatter_(1, ids_CK, 0.0)
    return SoftGradient(value_C, kl_C, entropy_C, peak_C, square_C, dense_CW=dense_CV, **sparse)
