"""As much of the teacher as leaves the label on top: the mixed target's label leads any other class by a margin.

weighting = Repair(config.loss.weighting)              Source: minimal repair of a wrong teacher, MFT (2506.15702).
"""

import torch

from distill.losses.token_stats import TokenStats
from distill.weighting.interface import Weighting
from herd.run.weighting import RepairAlpha

ROUNDING = 1e-4
"""Relative; p(label) and max p reach this point by different sums."""


class Repair(Weighting):
    """With m the margin: a p_label + 1 - a >= a max p + m, so a <= (1 - m) / (1 + max p - p_label)."""

    def __init__(self, settings: RepairAlpha) -> None:
        self._settings = settings

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        label = (-tokens.teacher_ce).exp()
        wrong = label < tokens.teacher_peak * (1 - ROUNDING)
        most = (1 - self._settings.margin) / (1 + (tokens.teacher_peak - label).clamp_min(0))
        return torch.where(wrong, most, 1.0).clamp_max(self._settings.peak)
