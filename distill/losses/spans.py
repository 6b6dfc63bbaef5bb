"""The chunked loss for a teacher with another tokenizer; gradients are made in the forward, as in distill.losses.fused.

    out = span_distillation(hidden_TH, head_VH, labels_T, targets, kind="spans", alpha=0.5)      # SpanTargets
    out.loss.backward()

Shapes: T tokens, H width, V student vocabulary, S spans; C tokens of a chunk, which never cuts a span in two.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from distill.losses.chunks import chunk_of
from distill.losses.fused import Distillation
from distill.losses.head_gradient import HeadGradient, working_dtype
from distill.losses.kernel import STATS, inverse
from distill.losses.merged_spans import Kind, merged_loss
from distill.losses.token_stats import Alpha, GradientProducts, TokenStats
from herd.run.errors import ConfigError
from teachers.spans import SpanTargets


def span_distillation(
    outputs: torch.Tensor,
    head_VH: torch.Tensor | None,
    labels_T: torch.Tensor,
    targets: SpanTargets,
    *,
    kind: Kind,
    matched_weight: float | None = 1.0,
    alpha: Alpha = 0.5,
    ignore_index: int = -100,
    normalizer: torch.Tensor | float | None = None,
    chunk_tokens: int | None = None,
) -> Distillation:
    """Sum over tokens of (1 - alpha) CE(label) + sum over spans of alpha L(span), / normalizer.

    `outputs`: hidden_TH, or logits_TV with `head_VH` None. L is `merged_spans.merged_loss`, and `kd` of the statistics
    its bound on the divergence. alpha is one number, one a token (a span takes its first token's) or a function of the
    spans' statistics; it is 0 for a token in no span and for a span with an ignored token. With both tokenizers the
    same, `spans` is `fused_linear_distillation`. Statistics of a span stand at its first token; a token in no span has
    the student's CE as the teacher's.
    """
    job = _Job.of(labels_T, targets, kind, matched_weight, alpha, ignore_index, normalizer, chunk_tokens)
    loss, stats_ST = _SpanDistillation.apply(outputs, head_VH, job)
    return Distillation(loss, stats_ST, job.valid_T.sum())


@dataclass(frozen=True)
class _Job:
    """Everything of one call that is not differentiated."""

    labels_T: torch.Tensor
    valid_T: torch.Tensor
    span_T: torch.Tensor
    targets: SpanTargets
    kind: Kind
    matched_weight: float | None
    alpha: Alpha
    chunk_tokens: int | None
    scale: torch.Tensor

    @classmethod
    def of(cls, labels_T, targets, kind, matched_weight, alpha, ignore_index, normalizer, chunk_tokens) -> "_Job":
        valid_T = labels_T != ignore_index
        count = valid_T.sum() if normalizer is None else torch.as_tensor(normalizer)
        span_T = _whole_spans(targets.span_T, valid_T, targets.first.num_tokens)
        labels_T = labels_T.masked_fill(~valid_T, 0)
        return cls(labels_T, valid_T, span_T, targets, kind, matched_weight, alpha, chunk_tokens, inverse(count))

    def chunks(self, vocabulary: int, outputs: torch.Tensor) -> Iterator[slice]:
        """Slices of about `chunk_tokens` tokens; one that would end inside a span ends after it."""
        spans = self.span_T.tolist()
        size = self.chunk_tokens or chunk_of(vocabulary, outputs.dtype.itemsize, outputs.device)
        start = 0
        while start < len(spans):
            end = min(start + size, len(spans))
            while end < len(spans) and spans[end] >= 0 and spans[end] == spans[end - 1]:
                end += 1
            yield slice(start, end)
            start = end

    def run(self, logits_CV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Statistics [len(STATS), C], the chunk's loss, and the scaled gradient, which overwrites the logits."""
        labels_C, valid_C = self.labels_T[rows], self.valid_T[rows].to(logits_CV.dtype)
        log_q_CV = logits_CV.log_softmax(1)
        ce_C = -log_q_CV.gather(1, labels_C[:, None]).squeeze(1)
        stats = {"ce": ce_C, "teacher_ce": ce_C.clone()} | {
            name: torch.zeros_like(ce_C) for name in STATS if name not in ("ce", "teacher_ce")
        }
        hard_C = torch.ones_like(ce_C)
        soft, total = None, logits_CV.new_zeros(())
        if (self.span_T[rows] >= 0).any():
            soft, total = self._soften(log_q_CV, rows, stats, hard_C)
        total = total + ((1 - stats["alpha"]) * ce_C * valid_C).sum()
        gradient_CV = log_q_CV.exp_().scatter_add_(1, labels_C[:, None], -torch.ones_like(ce_C)[:, None])
        gradient_CV.mul_((hard_C * valid_C)[:, None])
        if soft is not None:
            gradient_CV.index_add_(0, *soft)
        return torch.stack([stats[name] for name in STATS]) * valid_C, total * self.scale, gradient_CV.mul_(self.scale)

    def _soften(
        self, log_q_CV: torch.Tensor, rows: slice, stats: dict[str, torch.Tensor], hard_C: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Add this chunk's spans: fills `stats` and the weights `hard_C` of each token's q - e_label.

        Returns the first tokens with the gradients of their logits, and the spans' share of the loss. The probability
        of a later token is a factor of its span's masses, so its gradient is that of a cross-entropy, weighted.
        """
        inside = (self.span_T[rows] >= 0).nonzero().squeeze(1)
        numbers, place_N = self.span_T[rows][inside].unique_consecutive(return_inverse=True)
        first_S = inside.new_empty(len(numbers)).scatter_reduce_(0, place_N, inside, "amin", include_self=False)
        later_N = inside != first_S[place_N]
        zeros_S = log_q_CV.new_zeros(len(numbers))
        q_later_S = zeros_S.index_add(0, place_N[later_N], -stats["ce"][inside[later_N]])
        several_S = torch.zeros_like(numbers, dtype=torch.bool).index_fill_(0, place_N[later_N], True)
        log_p_SW, p_later_S, seen_S = self._teacher(numbers, log_q_CV.dtype)
        log_q_SV = log_q_CV[first_S]
        merged = merged_loss(
            *(log_q_SV, log_p_SW, q_later_S, p_later_S, several_S, self.targets.shared),
            kind=self.kind,
            matched_weight=self.matched_weight,
        )
        teacher_ce_S = -log_p_SW.gather(1, seen_S[:, None]).squeeze(1) - p_later_S
        entropy_S = -torch.linalg.vecdot(log_p_SW.exp(), log_p_SW)
        p_SW = log_p_SW.exp()
        student_ce_S, peak_S = stats["ce"][first_S] - q_later_S, p_SW.amax(1)
        square = partial(torch.linalg.vecdot, p_SW, p_SW)
        vocabulary = log_q_CV.shape[1]
        spans = TokenStats(student_ce_S, teacher_ce_S, merged.kl_S, entropy_S, peak_S, vocabulary, square, _no_products)
        alpha_S = self._alpha(spans, rows.start + first_S)
        for name, value_S in spans.asked.items():
            stats[name][first_S] = value_S
        stats["teacher_ce"][inside] = 0.0
        for name, value_S in (
            ("kd", merged.kl_S),
            ("kl", merged.kl_S),
            ("teacher_ce", teacher_ce_S),
            ("teacher_entropy", entropy_S),
        ):
            stats[name][first_S] = value_S
        stats["alpha"][inside] = alpha_S[place_N]
        slope_S = merged.pull_SV.sum(1)
        hard_C[inside] -= alpha_S[place_N] * (1 + slope_S[place_N] * later_N)
        gradient_SV = merged.pull_SV.sub_(log_q_SV.exp() * slope_S[:, None]).mul_(alpha_S[:, None])
        return (first_S, gradient_SV), (alpha_S * merged.loss_S).sum()

    def _teacher(self, numbers: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log probabilities at the first token of these spans, of the later ones, and the tokens seen."""
        between = slice(int(numbers[0]), int(numbers[-1]) + 1)
        log_p_SW = self.targets.first.logits(between)[numbers - between.start].to(dtype).log_softmax(1)
        return log_p_SW, self.targets.later_S[numbers].to(dtype), self.targets.seen_S[numbers]

    def _alpha(self, spans: TokenStats, first_S: torch.Tensor) -> torch.Tensor:
        if callable(self.alpha):
            return self.alpha(spans)
        if isinstance(self.alpha, torch.Tensor):
            return self.alpha[first_S].to(spans.student_ce.dtype)
        return torch.full_like(spans.student_ce, self.alpha)


def _no_products() -> GradientProducts:
    raise ConfigError("loss.weighting: a span's gradients are in the logits of several tokens; choose another kind")


def _whole_spans(span_T: torch.Tensor, valid_T: torch.Tensor, count: int) -> torch.Tensor:
    """The spans of the tokens, -1 also for every token of a span that holds an ignored one."""
    inside = span_T >= 0
    broken_S = span_T.new_zeros(count, dtype=torch.bool)
    broken_S[span_T[inside & ~valid_T]] = True
    return span_T.masked_fill(inside & broken_S[span_T.clamp_min(0)] if count else inside, -1)


class _SpanDistillation(torch.autograd.Function):
    """Loss of hidden @ head.T, or of logits when there is no head; gradients are complete when the forward returns."""

    @staticmethod
    def forward(ctx, outputs, head_VH, job):
        working = working_dtype(outputs.dtype)
        grad_outputs = torch.empty_like(outputs)
        grad_head = None if head_VH is None else HeadGradient(head_VH)
        stats_ST = outputs.new_empty((len(STATS), outputs.shape[0]), dtype=working)
        total = outputs.new_zeros((), dtype=torch.float64)
        vocabulary = outputs.shape[1] if head_VH is None else head_VH.shape[0]
        for rows in job.chunks(vocabulary, outputs):
            logits_CV = (outputs[rows] if head_VH is None else outputs[rows] @ head_VH.T).to(working)
            stats_ST[:, rows], loss, gradient_CV = job.run(logits_CV, rows)
            total += loss
            gradient_CV = gradient_CV.to(outputs.dtype)
            if head_VH is None:
                grad_outputs[rows] = gradient_CV
            else:
                torch.mm(gradient_CV, head_VH, out=grad_outputs[rows])
                grad_head.add(gradient_CV, outputs[rows])
        ctx.gradients = (grad_outputs, None if head_VH is None else grad_head.take())
        ctx.mark_non_differentiable(stats_ST)
        return total.to(working), stats_ST

    @staticmethod
    def backward(ctx, grad_loss, _):
        return *(None if g is None else g * grad_loss.to(g.dtype) for g in ctx.gradients), None
