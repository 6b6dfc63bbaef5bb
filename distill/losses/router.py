"""Where tokens are routed: a student's router drawn to a teacher's, with a map between their experts.

    divergence_T = router_divergence(student_TE, teacher_TF, even_expert_map(8, 4))

Shapes: T tokens, E experts of the student, F experts of the teacher. A map [F, E] says what share of a teacher
expert's probability each student expert takes over: rows are >= 0 and sum to one, so what is mapped sums to one.
"""

from collections.abc import Sequence

import torch


def router_divergence(student_TE: torch.Tensor, teacher_TF: torch.Tensor, map_FE: torch.Tensor) -> torch.Tensor:
    """KL(softmax(teacher) map || softmax(student)) of router logits, [T], nats; fp32, or fp64 for fp64 inputs.

    The teacher gets no gradient, a map that is learned does. Zero when the student routes as the mapped teacher.
    """
    dtype = torch.promote_types(student_TE.dtype, torch.float32)
    target_TE = teacher_TF.detach().to(dtype).softmax(-1) @ map_FE.to(dtype)
    return (torch.xlogy(target_TE, target_TE) - target_TE * student_TE.to(dtype).log_softmax(-1)).sum(-1)


def even_expert_map(teacher_experts: int, student_experts: int) -> torch.Tensor:
    """The map that keeps the order and loads student experts evenly: the identity for equal counts.

    Both sets are laid out over the same interval in equal parts; a share is the overlap of two parts.
    """
    teacher_edges = torch.arange(teacher_experts + 1, dtype=torch.float64) / teacher_experts
    student_edges = torch.arange(student_experts + 1, dtype=torch.float64) / student_experts
    ends_FE = torch.minimum(teacher_edges[1:, None], student_edges[None, 1:])
    starts_FE = torch.maximum(teacher_edges[:-1, None], student_edges[None, :-1])
    overlap_FE = (ends_FE - starts_FE).clamp_min(0.0)
    return (overlap_FE / overlap_FE.sum(1, keepdim=True)).float()


def listed_expert_map(experts: Sequence[int], student_experts: int) -> torch.Tensor:
    """The map that gives teacher expert f whole to student expert `experts[f]`."""
    return torch.nn.functional.one_hot(torch.tensor(experts), student_experts).float()
