"""Universal logit distillation: two distributions compared by their sorted masses, whatever their classes mean.

    distance_S, gradient_SV = sorted_difference(student_SV, teacher_SW)

Shapes: S rows, V classes of the student, W classes of the teacher.
Source: Boizard et al. 2024, arXiv 2402.12030: sum_i |p_(i) - q_(i)|, the shorter one padded with zeros.
"""

import torch
import torch.nn.functional as F


def sorted_difference(student_SV: torch.Tensor, teacher_SW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance [S] between masses >= 0, and its gradient [S, V] with respect to the student's.

    The gradient is +1, 0 or -1 a class: which way its mass is off from the teacher's mass of the same rank.
    """
    ranked_SV, order_SV = student_SV.sort(dim=1, descending=True)
    ranked_SW = teacher_SW.sort(dim=1, descending=True).values
    classes, theirs = student_SV.shape[1], teacher_SW.shape[1]
    difference = F.pad(ranked_SV, (0, max(0, theirs - classes))) - F.pad(ranked_SW, (0, max(0, classes - theirs)))
    gradient_SV = torch.empty_like(student_SV).scatter_(1, order_SV, difference[:, :classes].sign())
    return difference.abs().sum(1), gradient_SV
