"""Attention relations: which tokens of a row a model finds alike, whatever its width and number of heads.

    loss = relation_divergence(student_queries_BTX, teacher_queries_BTY, valid_BT, heads=8)     # also keys, values

Shapes: B rows, T tokens, X and Y widths of student and teacher, R relation heads, D = X / R, C rows of a chunk.
Source: MiniLMv2, Wang et al. 2021, arXiv 2012.15828, equations 5-8; causal here, as a decoder's attention is.
"""

import torch


def relation_divergence(
    student_BTX: torch.Tensor,
    teacher_BTY: torch.Tensor,
    valid_BT: torch.Tensor,
    *,
    heads: int,
    chunk_rows: int = 256,
) -> torch.Tensor:
    """Sum over valid tokens t of KL(A_teacher[t] || A_student[t]), mean over relation heads; nats, a scalar.

    A = softmax(X X^T / sqrt(D)) over the tokens up to t, X being queries, keys or values (before RoPE) cut anew into
    `heads` parts, so that neither head counts nor widths need to agree; both widths must divide by `heads`.
    The gradient is made in the forward: chunk_rows x T scores per head exist at a time. The teacher gets none.
    """
    return _RelationDivergence.apply(student_BTX, teacher_BTY.detach(), valid_BT, heads, chunk_rows)


class _RelationDivergence(torch.autograd.Function):
    """With S = X X^T / sqrt(D) and G = dL/dS = (A_student - A_teacher) / R: dL/dX = (G + G^T) X / sqrt(D)."""

    @staticmethod
    def forward(ctx, student_BTX, teacher_BTY, valid_BT, heads, chunk_rows):
        student_BRTD, teacher_BRTD = _split(student_BTX, heads), _split(teacher_BTY, heads)
        grad_BRTD = torch.zeros_like(student_BRTD)
        scale = student_BRTD.shape[-1] ** -0.5
        total = student_BRTD.new_zeros(())
        length = student_BRTD.shape[2]
        for start in range(0, length, chunk_rows):
            end = min(start + chunk_rows, length)
            later_CT = torch.ones(end - start, end, dtype=torch.bool, device=valid_BT.device).triu_(start + 1)
            log_q_BRCT, log_p_BRCT = (_log_relations(x, start, end, later_CT) for x in (student_BRTD, teacher_BRTD))
            p_BRCT = log_p_BRCT.exp()
            weight_BC = valid_BT[:, None, start:end].to(total.dtype) / heads
            divergence_BRC = (p_BRCT * (log_p_BRCT - log_q_BRCT).masked_fill_(later_CT, 0.0)).sum(-1)
            total += (divergence_BRC * weight_BC).sum()
            score_grad_BRCT = (log_q_BRCT.exp_() - p_BRCT) * (weight_BC[..., None] * scale)
            grad_BRTD[:, :, start:end] += score_grad_BRCT @ student_BRTD[:, :, :end]
            grad_BRTD[:, :, :end] += score_grad_BRCT.mT @ student_BRTD[:, :, start:end]
        ctx.gradient = grad_BRTD.transpose(1, 2).flatten(2).to(student_BTX.dtype)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        return ctx.gradient * grad_total.to(ctx.gradient.dtype), None, None, None, None


def _split(vectors_BTX: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, R, T, D], in fp32 or fp64."""
    dtype = torch.promote_types(vectors_BTX.dtype, torch.float32)
    return vectors_BTX.unflatten(2, (heads, -1)).transpose(1, 2).to(dtype)


def _log_relations(vectors_BRTD: torch.Tensor, start: int, end: int, later_CT: torch.Tensor) -> torch.Tensor:
    """log A of the rows from `start` to `end`; -inf for later tokens."""
    scores_BRCT = vectors_BRTD[:, :, start:end] @ vectors_BRTD[:, :, :end].mT
    scores_BRCT.mul_(vectors_BRTD.shape[-1] ** -0.5).masked_fill_(later_CT, -torch.inf)
    return scores_BRCT.log_softmax(-1)
