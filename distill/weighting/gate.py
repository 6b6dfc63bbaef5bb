"""Soft targets where the teacher expected the label more than it usually does: sigmoid(k (log p(label) - mean)).

weighting = Gate(config.loss.weighting, steps=400)
"""

import torch

from distill.losses.token_stats import TokenStats
from distill.weighting.interface import StepStats, Weighting
from distill.weighting.running_mean import RunningMean, horizon_of
from herd.run.weighting import GateAlpha


class Gate(Weighting):
    """A gate on the very label that is learnt: it also selects on the label's luck (docs/weighting.md)."""

    def __init__(self, settings: GateAlpha, *, steps: int) -> None:
        self._sharpness = settings.sharpness
        self._usual = RunningMean(horizon_of(settings.horizon, steps))

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        usual = self._usual.value if self._usual.weight else tokens.teacher_ce
        return torch.sigmoid(self._sharpness * (usual - tokens.teacher_ce))

    def update(self, stats: StepStats) -> None:
        self._usual.add(stats.teacher_ce)

    def metrics(self) -> dict[str, float]:
        return {"usual_teacher_ce": self._usual.value}

    def state_dict(self) -> dict[str, float]:
        return self._usual.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._usual.load_state_dict(state)
