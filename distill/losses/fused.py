"""The chunked distillation loss: gradients are made in the forward, logits of one chunk exist at a time.

    out = fused_linear_distillation(hidden_TH, head_VH, labels_T, LinearTargets(hidden_TG, head_VG), alpha=0.5)
    out.loss.backward()

Shapes: T tokens, H width, V vocabulary, C tokens of a chunk, S statistics of distill.losses.kernel.STATS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from distill.losses.kernel import STATS, Alpha, TokenStats, mix_chunk
from herd.run.errors import ConfigError
from teachers.targets import SoftTargets

__all__ = ["Distillation", "TokenStats", "distillation_from_logits", "fused_linear_distillation"]


@dataclass(frozen=True)
class Distillation:
    """A loss and what it was made of. `loss` carries gradients; the sums run over valid tokens, in nats."""

    loss: torch.Tensor
    stats_ST: torch.Tensor
    """Per token, zero where ignored: ce, kd, teacher_ce, teacher_entropy, alpha."""
    num_tokens: torch.Tensor
    """Valid tokens, a scalar tensor."""

    @property
    def ce(self) -> torch.Tensor:
        """Mean cross-entropy on the labels."""
        return self.stats_ST[STATS.index("ce")].sum() / self.num_tokens.clamp_min(1)

    @property
    def kd(self) -> torch.Tensor:
        """Mean divergence to the teacher, at the loss's temperature and without its square."""
        return self.stats_ST[STATS.index("kd")].sum() / self.num_tokens.clamp_min(1)


def fused_linear_distillation(
    hidden_TH: torch.Tensor,
    head_VH: torch.Tensor,
    labels_T: torch.Tensor,
    targets: SoftTargets | None = None,
    *,
    alpha: Alpha = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    normalizer: torch.Tensor | float | None = None,
    chunk_tokens: int = 512,
) -> Distillation:
    """(1 - alpha) CE(label) + alpha temperature^2 KL(teacher || student), summed over valid tokens / normalizer.

    `labels_T` are already shifted. `normalizer` is the number of valid tokens the loss is a mean over (all
    micro-batches and ranks); by default those of this call. With no targets it is the cross-entropy.
    Peak extra memory: the gradients of both inputs and a few [chunk_tokens, V] tensors.
    """
    _check(hidden_TH.shape[0], labels_T, targets, alpha, temperature)
    job = _Job.of(labels_T, targets, alpha, temperature, ignore_index, normalizer, chunk_tokens)
    loss, stats_ST = _FusedLinear.apply(hidden_TH, head_VH, job)
    return Distillation(loss, stats_ST, job.valid_T.sum())


def distillation_from_logits(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    targets: SoftTargets | None = None,
    *,
    alpha: Alpha = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    normalizer: torch.Tensor | float | None = None,
    chunk_tokens: int = 512,
) -> Distillation:
    """The same loss for a model whose logits are more than hidden states times a matrix (soft caps, scales)."""
    _check(logits_TV.shape[0], labels_T, targets, alpha, temperature)
    job = _Job.of(labels_T, targets, alpha, temperature, ignore_index, normalizer, chunk_tokens)
    loss, stats_ST = _FromLogits.apply(logits_TV, job)
    return Distillation(loss, stats_ST, job.valid_T.sum())


@dataclass(frozen=True)
class _Job:
    """Everything of one call that is not differentiated."""

    labels_T: torch.Tensor
    valid_T: torch.Tensor
    targets: SoftTargets | None
    alpha: Alpha
    temperature: float
    chunk_tokens: int
    scale: torch.Tensor

    @classmethod
    def of(cls, labels_T, targets, alpha, temperature, ignore_index, normalizer, chunk_tokens) -> "_Job":
        valid_T = labels_T != ignore_index
        count = valid_T.sum() if normalizer is None else torch.as_tensor(normalizer)
        scale = 1.0 / count.double().clamp_min(1)
        return cls(labels_T.masked_fill(~valid_T, 0), valid_T, targets, alpha, temperature, chunk_tokens, scale)

    def chunks(self) -> list[slice]:
        step = self.chunk_tokens
        return [slice(start, min(start + step, len(self.labels_T))) for start in range(0, len(self.labels_T), step)]

    def run(self, logits_CV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Statistics [S, C] and the scaled gradient [C, V], which overwrites the fp32 (or fp64) logits."""
        stats_SC, gradient_CV = mix_chunk(
            logits_CV,
            self.labels_T[rows],
            self.valid_T[rows].to(logits_CV.dtype),
            None if self.targets is None else self.targets.logits(rows),
            alpha=self._alpha_of(rows),
            temperature=self.temperature,
        )
        return stats_SC, gradient_CV.mul_(self.scale)

    def _alpha_of(self, rows: slice) -> Callable[[TokenStats], torch.Tensor]:
        alpha = self.alpha
        if callable(alpha):
            return alpha
        if isinstance(alpha, torch.Tensor):
            return lambda stats: alpha[rows].to(stats.student_ce.dtype)
        return lambda stats: torch.full_like(stats.student_ce, alpha)

    def total(self, stats_ST: torch.Tensor) -> torch.Tensor:
        ce_T, kd_T, _, _, alpha_T = stats_ST
        return (((1 - alpha_T) * ce_T + alpha_T * self.temperature**2 * kd_T).sum() * self.scale).to(stats_ST.dtype)


def _working(dtype: torch.dtype) -> torch.dtype:
    """Logits are handled in fp32, or in fp64 when the inputs are (reference runs)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _FusedLinear(torch.autograd.Function):
    """Loss of hidden @ head.T; both gradients are complete when the forward returns."""

    @staticmethod
    def forward(ctx, hidden_TH, head_VH, job):
        working = _working(hidden_TH.dtype)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_TH = torch.empty_like(hidden_TH) if need_hidden else None
        # Summing chunks in bf16 would lose the small ones, so the head's gradient is gathered in fp32.
        grad_VH = torch.zeros_like(head_VH, dtype=working) if need_head else None
        stats_ST = hidden_TH.new_empty((len(STATS), hidden_TH.shape[0]), dtype=working)
        for rows in job.chunks():
            hidden_CH = hidden_TH[rows]
            logits_CV = (hidden_CH @ head_VH.T).to(working)
            stats_ST[:, rows], gradient_CV = job.run(logits_CV, rows)
            gradient_CV = gradient_CV.to(hidden_TH.dtype)
            if need_hidden:
                torch.mm(gradient_CV, head_VH, out=grad_TH[rows])
            if need_head and working == head_VH.dtype:
                grad_VH.addmm_(gradient_CV.T, hidden_CH)
            elif need_head:
                grad_VH.add_(gradient_CV.T @ hidden_CH)
        ctx.gradients = (grad_TH, None if grad_VH is None else grad_VH.to(head_VH.dtype))
        ctx.mark_non_differentiable(stats_ST)
        return job.total(stats_ST), stats_ST

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_TH, grad_VH = ctx.gradients
        ctx.gradients = None
        scaled = (None if g is None else g.mul_(grad_loss.to(g.dtype)) for g in (grad_TH, grad_VH))
        return *scaled, None


class _FromLogits(torch.autograd.Function):
    """Loss of logits that exist; their gradient is complete when the forward returns."""

    @staticmethod
    def forward(ctx, logits_TV, job):
        working = _working(logits_TV.dtype)
        grad_TV = torch.empty_like(logits_TV)
        stats_ST = logits_TV.new_empty((len(STATS), logits_TV.shape[0]), dtype=working)
        for rows in job.chunks():
            stats_ST[:, rows], gradient_CV = job.run(logits_TV[rows].to(working, copy=True), rows)
            grad_TV[rows] = gradient_CV
        ctx.gradient = grad_TV
        ctx.mark_non_differentiable(stats_ST)
        return job.total(stats_ST), stats_ST

    @staticmethod
    def backward(ctx, grad_loss, _):
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_loss.to(gradient.dtype)), None


def _check(
    num_tokens: int, labels_T: torch.Tensor, targets: SoftTargets | None, alpha: Alpha, temperature: float
) -> None:
    if labels_T.shape != (num_tokens,):
        raise ConfigError(f"labels have shape {tuple(labels_T.shape)}, hidden states {num_tokens} tokens; flatten both")
    if targets is not None and targets.num_tokens != num_tokens:
        raise ConfigError(f"targets cover {targets.num_tokens} tokens, the student {num_tokens}; use the same batch")
    if not temperature > 0:
        raise ConfigError(f"temperature = {temperature}: must be above 0")
    if isinstance(alpha, (int, float)) and not 0 <= alpha <= 1:
        raise ConfigError(f"alpha = {alpha}: must be in [0, 1]")
