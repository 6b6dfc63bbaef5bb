"""How far a student's hidden states are from a teacher's, token by token.

    distance_T = hidden_state_distance(projection(hidden_TH), teacher_TG, "cosine")

Shapes: T tokens (any leading dimensions), H student width, G teacher width.
"""

from typing import Literal

import torch
import torch.nn.functional as F

Measure = Literal["mse", "normalised_mse", "cosine"]


def hidden_state_distance(student_TG: torch.Tensor, teacher_TG: torch.Tensor, measure: Measure) -> torch.Tensor:
    """Distance [T] in fp32 (fp64 for fp64 inputs); 0 where the two are equal. The student comes already projected.

    mse: |s - t|^2 / G. normalised_mse: |s - t|^2 / |t|^2, which is 1 for a student of zeros at any scale of the
    teacher. cosine: 1 - cos(s, t), blind to scale. The teacher gets no gradient.
    """
    dtype = torch.promote_types(student_TG.dtype, torch.float32)
    student_TG, teacher_TG = student_TG.to(dtype), teacher_TG.detach().to(dtype)
    if measure == "cosine":
        return 1 - F.cosine_similarity(student_TG, teacher_TG, dim=-1)
    squared_T = (student_TG - teacher_TG).square().sum(-1)
    if measure == "mse":
        return squared_T / teacher_TG.shape[-1]
    return squared_T / teacher_TG.square().sum(-1).clamp_min(torch.finfo(dtype).tiny)
