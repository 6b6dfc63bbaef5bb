"""The tensors of one call, in the shape, order, precision and place a target wants them.

    layout = Layout("BTV", shifts=True, dtype=torch.float32, device="cpu")
    student_BTV = layout.lay(problem.student_TV, problem.rows)

Shapes: T tokens of a problem, N positions laid out (one more a row for losses that shift), V vocabulary.
"""

from dataclasses import dataclass

import torch

from distill.conformance.problem import IGNORED, Problem


@dataclass(frozen=True)
class Layout:
    """How a target wants its tokens."""

    kind: str
    """TV: tokens in one row. BTV: rows and positions."""
    shifts: bool
    """It takes labels as a model does, and scores position t against label t + 1 itself."""
    dtype: torch.dtype
    device: str

    def lay(self, x_T: torch.Tensor, rows: int, *, ahead: float | None = None) -> torch.Tensor:
        """A tensor of tokens as the target wants it: a copy that gradients pass through.

        A loss that shifts gets one more position a row, which no label follows: the last one again. Labels get `ahead`
        in front instead.
        """
        rows = rows if self.kind == "BTV" else 1
        laid = x_T.reshape(rows, -1, *x_T.shape[1:])
        if self.shifts and ahead is None:
            laid = torch.cat((laid, laid[:, -1:]), 1)
        elif self.shifts:
            laid = torch.cat((torch.full_like(laid[:, :1], ahead), laid), 1)
        laid = laid if self.kind == "BTV" else laid.flatten(0, 1)
        return laid.to(self.device, self.dtype if laid.is_floating_point() else laid.dtype, copy=True)


def teacher_of(problem: Problem, layout: Layout, temperature: float, *, tail: str | None) -> dict[str, torch.Tensor]:
    """Every form of teacher the problem can be given with: a few classes and what `tail` says of the rest, or all."""
    rows = problem.rows
    if tail is not None:
        ids_TK, probs_TK = (problem.sampled if tail == "sampled" else problem.sparse)(temperature)
        given = {"teacher_ids": ids_TK, "teacher_probs": probs_TK, "teacher_logprobs": probs_TK.log()}
        return {name: layout.lay(x_T, rows) for name, x_T in given.items()}
    log_p_TV = torch.log_softmax(problem.teacher_TV / temperature, 1)
    given = {"teacher_logits": problem.teacher_TV, "teacher_probs": log_p_TV.exp(), "teacher_logprobs": log_p_TV}
    laid = {name: layout.lay(x_T, rows) for name, x_T in given.items()}
    laid["teacher_hidden"], laid["teacher_head"] = factor(laid["teacher_logits"])
    return laid


def labels_of(problem: Problem, layout: Layout) -> dict[str, torch.Tensor]:
    """Labels, the mask of those that count, and input ids that nothing depends on."""
    return {
        "input_ids": layout.lay(problem.labels_T.clamp_min(0), problem.rows),
        "labels": layout.lay(problem.labels_T, problem.rows, ahead=IGNORED),
        "mask": layout.lay(problem.valid_T, problem.rows, ahead=False),
    }


def factor(laid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden and head whose product is exactly these logits: one-hot states, so the head's gradient is the logits'."""
    flat_NV = laid.reshape(-1, laid.shape[-1])
    hidden_NN = torch.eye(len(flat_NV), dtype=laid.dtype, device=laid.device)
    return hidden_NN.reshape(*laid.shape[:-1], len(flat_NV)), flat_NV.T.contiguous()
