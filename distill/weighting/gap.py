"""Soft targets as far as the teacher is ahead: on each label, in the running mean, or in that of each entropy bin.

    token:          alpha = peak x sigmoid(gap / scale)
    step, entropy:  alpha = peak x clip(running gap / scale, 0, 1)              gap = CE_student - CE_teacher

weighting = Gap(config.loss.weighting, steps=400)
"""

from typing import Any

import torch

from distill.losses.token_stats import TokenStats
from distill.weighting import entropy_bins
from distill.weighting.interface import StepStats, Weighting
from distill.weighting.running_mean import BinnedMeans, RunningMean, horizon_of
from herd.run.weighting import GapAlpha


class Gap(Weighting):
    """The mean follows a co-trained teacher: low while that is no better, falling as the student arrives."""

    def __init__(self, settings: GapAlpha, *, steps: int) -> None:
        self._settings = settings
        horizon = horizon_of(settings.horizon, steps)
        self._whole, self._bins = RunningMean(horizon), BinnedMeans(("gap",), horizon)

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        s = self._settings
        if s.over == "token":
            return s.peak * torch.sigmoid((tokens.student_ce - tokens.teacher_ce) / s.scale)
        if s.over == "step":
            return torch.full_like(tokens.student_ce, s.peak * min(1.0, max(0.0, self._whole.value / s.scale)))
        gap_K = tokens.student_ce.new_tensor(self._bins.values("gap"))
        return (s.peak * (gap_K / s.scale).clamp(0, 1))[entropy_bins.of(tokens.teacher_entropy)]

    def update(self, stats: StepStats) -> None:
        self._whole.add(stats.gap)
        self._bins.add(stats.bins, lambda of_bin: (of_bin.gap,))

    def metrics(self) -> dict[str, float]:
        return {"gap": self._whole.value}

    def state_dict(self) -> dict[str, Any]:
        return {"whole": self._whole.state_dict(), "bins": self._bins.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._whole.load_state_dict(state["whole"])
        self._bins.load_state_dict(state["bins"])
