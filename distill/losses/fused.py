"""The chunked distillation loss: gradients are made in the forward, logits of one chunk exist at a time.

    out = fused_linear_distillation(hidden_TH, head_VH, labels_T, LinearTargets(hidden_TG, head_VG), alpha=0.5)
    out.loss.backward()

Shapes: T tokens, H width, V vocabulary, C tokens of a chunk, S statistics of distill.losses.kernel.STATS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from distill.losses.chunks import block_of, chunk_of, slices
from distill.losses.divergences import divergence as named_divergence
from distill.losses.head_gradient import HeadGradient, working_dtype
from distill.losses.kernel import STATS, LossTerms, check_targets, inverse, mix_chunk
from distill.losses.token_stats import Alpha, TokenStats
from herd.run.errors import ConfigError
from teachers.targets import RoutedTargets, SoftTargets, SparseTargets


@dataclass(frozen=True)
class Distillation:
    """A loss and what it was made of. `loss` carries gradients; the sums run over valid tokens, in nats."""

    loss: torch.Tensor
    stats_ST: torch.Tensor
    """Per token, zero where ignored, in the order of distill.losses.kernel.STATS."""
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
    divergence: str = "forward_kl",
    parameter: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    normalizer: torch.Tensor | float | None = None,
    chunk_tokens: int | None = None,
) -> Distillation:
    """(1 - alpha) CE(label) + alpha temperature^2 D(teacher, student), summed over valid tokens / normalizer.

    `labels_T` are already shifted. `normalizer` is the number of valid tokens the loss is a mean over (all
    micro-batches and ranks); by default those of this call. With no targets it is the cross-entropy. Divergences and
    their `parameter`: distill.losses.divergences. Peak extra memory: the gradients of both inputs and a few
    [chunk_tokens, V] tensors.
    """
    job = _Job.of(
        len(hidden_TH),
        labels_T,
        targets,
        alpha=alpha,
        terms=_terms(divergence, parameter, temperature, label_smoothing, z_loss),
        ignore_index=ignore_index,
        normalizer=normalizer,
        chunk_tokens=chunk_tokens,
    )
    loss, stats_ST = _FusedLinear.apply(hidden_TH, head_VH, job)
    return Distillation(loss, stats_ST, job.valid_T.sum())


def distillation_from_logits(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    targets: SoftTargets | None = None,
    *,
    alpha: Alpha = 0.5,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    parameter: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    normalizer: torch.Tensor | float | None = None,
    chunk_tokens: int | None = None,
) -> Distillation:
    """The same loss for a model whose logits are more than hidden states times a matrix (soft caps, scales)."""
    job = _Job.of(
        len(logits_TV),
        labels_T,
        targets,
        alpha=alpha,
        terms=_terms(divergence, parameter, temperature, label_smoothing, z_loss),
        ignore_index=ignore_index,
        normalizer=normalizer,
        chunk_tokens=chunk_tokens,
    )
    loss, stats_ST = _FromLogits.apply(logits_TV, job)
    return Distillation(loss, stats_ST, job.valid_T.sum())


def _terms(
    divergence: str, parameter: float | None, temperature: float, label_smoothing: float, z_loss: float
) -> LossTerms:
    if not temperature > 0:
        raise ConfigError(f"temperature = {temperature}: must be above 0")
    if not 0 <= label_smoothing <= 1:
        raise ConfigError(f"label_smoothing = {label_smoothing}: must be in [0, 1]")
    if not z_loss >= 0:
        raise ConfigError(f"z_loss = {z_loss}: must be 0 or more")
    return LossTerms(named_divergence(divergence, parameter), temperature, label_smoothing, z_loss)


@dataclass(frozen=True)
class _Job:
    """Everything of one call that is not differentiated."""

    labels_T: torch.Tensor
    valid_T: torch.Tensor
    targets: SoftTargets | None
    alpha: Alpha
    terms: LossTerms
    chunk_tokens: int | None
    scale: torch.Tensor
    """1 / normalizer, fp64."""
    absent_T: torch.Tensor | None
    """True where there should be a target and is none."""

    @classmethod
    def of(cls, num_tokens, labels_T, targets, *, alpha, terms, ignore_index, normalizer, chunk_tokens):
        _check(num_tokens, labels_T, targets, alpha)
        if targets is not None:
            check_targets(targets, terms)
        valid_T = labels_T != ignore_index
        count = valid_T.sum() if normalizer is None else torch.as_tensor(normalizer)
        return cls(
            labels_T.masked_fill(~valid_T, 0),
            valid_T,
            targets,
            alpha,
            terms,
            chunk_tokens,
            inverse(count),
            _absent(targets),
        )

    def chunks(self, vocabulary: int, inputs: torch.Tensor) -> list[slice]:
        size = self.chunk_tokens or chunk_of(vocabulary, inputs.dtype.itemsize, inputs.device)
        return slices(0, len(self.labels_T), size)

    def mix(self, logits_CV: torch.Tensor, rows: slice, stats_ST: torch.Tensor) -> torch.Tensor:
        """Turn the logits of these tokens into every token's own gradient, ignored ones' too; returns their loss.

        On a CPU block by block in fp32 (or fp64), so that no fp32 [C, V] tensor is made of bf16 logits.
        """
        total = torch.zeros((), dtype=torch.float64, device=logits_CV.device)
        # The teacher's logits exist for half a chunk only.
        for half in slices(rows.start, rows.stop, -(-(rows.stop - rows.start) // 2)):
            sparse = isinstance(self.targets, SparseTargets)
            full_CV = None if sparse or self.targets is None else self.targets.logits(half)
            whole = half.stop - half.start
            for block in slices(half.start, half.stop, whole if logits_CV.is_cuda else block_of(logits_CV.shape[1])):
                teacher = full_CV
                if full_CV is not None:
                    inside = slice(block.start - half.start, block.stop - half.start)
                    teacher = full_CV[inside, : logits_CV.shape[1]].to(stats_ST.dtype)
                elif sparse:
                    teacher = self.targets.rows(block)
                inside = slice(block.start - rows.start, block.stop - rows.start)
                total += self._mix_block(logits_CV[inside], block, teacher, stats_ST)
        return total

    def _mix_block(
        self,
        logits_BV: torch.Tensor,
        block: slice,
        teacher: torch.Tensor | SparseTargets | None,
        stats_ST: torch.Tensor,
    ) -> torch.Tensor:
        working_BV = logits_BV.to(stats_ST.dtype)
        loss_B, stats_ST[:, block] = mix_chunk(
            working_BV,
            self.labels_T[block],
            self.valid_T[block],
            teacher,
            alpha=self._alpha_of(block),
            terms=self.terms,
            absent_C=None if self.absent_T is None else self.absent_T[block],
        )
        if working_BV.dtype != logits_BV.dtype:
            logits_BV.copy_(working_BV)
        return loss_B.sum(dtype=torch.float64)

    def _alpha_of(self, rows: slice) -> Callable[[TokenStats], torch.Tensor]:
        alpha = self.alpha
        if callable(alpha):
            return alpha
        if isinstance(alpha, torch.Tensor):
            return lambda stats: alpha[rows].to(stats.student_ce.dtype)
        return lambda stats: torch.full_like(stats.student_ce, alpha)


class _FusedLinear(torch.autograd.Function):
    """Loss of hidden @ head.T; both gradients are complete when the forward returns."""

    @staticmethod
    def forward(ctx, hidden_TH, head_VH, job):
        working = working_dtype(hidden_TH.dtype)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_TH = torch.empty_like(hidden_TH) if need_hidden else None
        grad_head = HeadGradient(head_VH) if need_head else None
        stats_ST = hidden_TH.new_empty((len(STATS), hidden_TH.shape[0]), dtype=working)
        total = stats_ST.new_zeros((), dtype=torch.float64)
        chunks = job.chunks(head_VH.shape[0], hidden_TH)
        buffer_CV = hidden_TH.new_empty(chunks[0].stop if chunks else 0, head_VH.shape[0])
        for rows in chunks:
            gradient_CV = torch.mm(hidden_TH[rows], head_VH.T, out=buffer_CV[: rows.stop - rows.start])
            total += job.mix(gradient_CV, rows, stats_ST)
            if need_hidden:
                torch.mm(gradient_CV, head_VH, out=grad_TH[rows])
            if need_head:
                # Ignored tokens leave by their hidden state: a row of H numbers, not of V.
                grad_head.add(gradient_CV, hidden_TH[rows].masked_fill(~job.valid_T[rows, None], 0.0))
        del buffer_CV
        if need_hidden:
            grad_TH.mul_(job.scale.to(working)).masked_fill_(~job.valid_T[:, None], 0.0)
        ctx.gradients = (grad_TH, grad_head.take(job.scale) if need_head else None)
        ctx.mark_non_differentiable(stats_ST)
        return (total * job.scale).to(working), stats_ST

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
        working = working_dtype(logits_TV.dtype)
        grad_TV = logits_TV.clone()
        stats_ST = logits_TV.new_empty((len(STATS), logits_TV.shape[0]), dtype=working)
        total = stats_ST.new_zeros((), dtype=torch.float64)
        for rows in job.chunks(logits_TV.shape[1], logits_TV):
            total += job.mix(grad_TV[rows], rows, stats_ST)
        grad_TV.mul_(job.scale.to(grad_TV.dtype)).masked_fill_(~job.valid_T[:, None], 0.0)
        ctx.gradient = grad_TV
        ctx.mark_non_differentiable(stats_ST)
        return (total * job.scale).to(working), stats_ST

    @staticmethod
    def backward(ctx, grad_loss, _):
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_loss.to(gradient.dtype)), None


def _absent(targets: SoftTargets | None) -> torch.Tensor | None:
    partial = isinstance(targets, SparseTargets | RoutedTargets) and targets.present_T is not None
    return ~targets.present_T if partial else None


def _check(num_tokens: int, labels_T: torch.Tensor, targets: SoftTargets | None, alpha: Alpha) -> None:
    if labels_T.shape != (num_tokens,):
        raise ConfigError(f"labels have shape {tuple(labels_T.shape)}, hidden states {num_tokens} tokens; flatten both")
    if targets is not None and targets.num_tokens != num_tokens:
        raise ConfigError(f"targets cover {targets.num_tokens} tokens, the student {num_tokens}; use the same batch")
    if isinstance(alpha, torch.Tensor):
        if alpha.shape != (num_tokens,):
            raise ConfigError(f"alpha has shape {tuple(alpha.shape)}, one a token is ({num_tokens},)")
        outside = alpha[~((alpha >= 0) & (alpha <= 1))]
        if len(outside):
            raise ConfigError(f"alpha = {outside[0].item():g}: every token's must be in [0, 1]")
    elif not callable(alpha) and not 0 <= alpha <= 1:
        raise ConfigError(f"alpha = {alpha}: must be in [0, 1]")
