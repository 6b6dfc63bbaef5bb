"""Soft and hard targets weighted by learnt noise: L = exp(-a) KD + exp(-b) CE + a + b (Kendall 2018, 1705.07115).

    alpha = exp(-a) / (exp(-a) + exp(-b)); each step: a += rate (exp(-a) KD - 1), b += rate (exp(-b) CE - 1)

weighting = Uncertainty(config.loss.weighting)
"""

import math

import torch

from distill.losses.token_stats import TokenStats
from distill.weighting.interface import StepStats, Weighting
from herd.run.weighting import UncertaintyAlpha


class Uncertainty(Weighting):
    """At rest a = log KD and b = log CE, so alpha = CE / (CE + KD): the closer student and teacher, the more of it."""

    def __init__(self, settings: UncertaintyAlpha) -> None:
        self._settings = settings
        self._soft, self._hard = 0.0, 0.0

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        return torch.full_like(tokens.student_ce, 1 / (1 + math.exp(self._soft - self._hard)))

    def update(self, stats: StepStats) -> None:
        self._soft = self._moved(self._soft, stats.distillation)
        self._hard = self._moved(self._hard, stats.student_ce)

    def _moved(self, log_variance: float, loss: float) -> float:
        s = self._settings
        moved = log_variance + s.rate * (math.exp(-log_variance) * loss - 1)
        return min(s.bound, max(-s.bound, moved))

    def metrics(self) -> dict[str, float]:
        return {"log_variance_soft": self._soft, "log_variance_hard": self._hard}

    def state_dict(self) -> dict[str, float]:
        return {"soft": self._soft, "hard": self._hard}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._soft, self._hard = state["soft"], state["hard"]
