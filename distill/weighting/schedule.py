"""A weight that follows the clock: linear, cosine or staged, in either direction.

weighting = Schedule(config.loss.weighting, steps=400)
"""

import math

import torch

from distill.losses.token_stats import TokenStats
from distill.weighting.interface import StepStats, Weighting
from herd.run.weighting import ScheduledAlpha


class Schedule(Weighting):
    """alpha goes from `start` to `end` between the shares `begin` and `until` of the run."""

    def __init__(self, settings: ScheduledAlpha, *, steps: int) -> None:
        self._settings, self._steps, self._step = settings, steps, 0

    def value(self, step: int) -> float:
        """alpha of this step (0 for the first)."""
        s = self._settings
        share = step / self._steps
        if s.shape == "staged" or s.until == s.begin:
            return s.end if share >= s.until else s.start
        progress = min(1.0, max(0.0, (share - s.begin) / (s.until - s.begin)))
        if s.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return s.start + (s.end - s.start) * progress

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        return torch.full_like(tokens.student_ce, self.value(self._step))

    def update(self, stats: StepStats) -> None:
        self.pass_over(stats.step)

    def pass_over(self, step: int) -> None:
        self._step = step + 1

    def state_dict(self) -> dict[str, float]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._step = int(state["step"])
