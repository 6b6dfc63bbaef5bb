"""The dynamic default: listen to the teacher as far as it is measurably ahead of the student.

    alpha = peak * clip((gap - margin) / width, 0, 1),   gap = running mean of CE_student - CE_teacher

Both are measured on batches neither has trained on yet. The margin is a dead zone: a teacher that is not clearly
ahead gets no weight at all, so an immature one costs nothing (docs/weighting.md has the measurements).
"""

import torch

from distill.losses.kernel import TokenStats
from distill.weighting.interface import StepStats
from herd.run.schema import GapAlpha


class Gap:
    """One weight for all tokens of a step: a token's own label is noise to gate on, the running mean is not."""

    def __init__(self, settings: GapAlpha) -> None:
        self._settings = settings
        self._sum, self._weight = 0.0, 0.0

    @property
    def gap(self) -> float:
        """Nats the teacher is ahead, averaged over the horizon; 0 before the first step."""
        return self._sum / self._weight if self._weight else 0.0

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        s = self._settings
        weight = s.peak * min(1.0, max(0.0, (self.gap - s.margin) / s.width))
        return torch.full_like(tokens.student_ce, weight)

    def update(self, stats: StepStats) -> None:
        keep = 1.0 - 1.0 / self._settings.horizon
        self._sum = keep * self._sum + stats.student_ce - stats.teacher_ce
        self._weight = keep * self._weight + 1.0  # dividing by it undoes the bias of the early steps

    def metrics(self) -> dict[str, float]:
        return {"gap": self.gap}

    def state_dict(self) -> dict[str, float]:
        return {"sum": self._sum, "weight": self._weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._sum, self._weight = float(state["sum"]), float(state["weight"])
