"""The dynamic default: follow a teacher as far as it leads towards the truth, and as it is ahead of its own growth.

    alpha = peak * clip((1 + trust) / (1 + sure), 0, 1) * clip(gap / (scale + growth), 0, 1)

    gap = CE_student - CE_teacher          trust = gap / KL(teacher || student)
    growth = nats by which CE_teacher falls while the steps taken grow by a factor e; 0 for a frozen teacher

Where it comes from and what it measured, against which others: docs/weighting.md.
"""

import torch

from distill.losses.token_stats import TokenStats
from distill.weighting.growing_mean import GrowingMean, fall
from distill.weighting.interface import StepStats, Weighting
from herd.run.weighting import MaturityAlpha

FAST, SLOW = 8, 2
"""Powers of the means: the last eighth of all steps so far, and the last half."""


class Maturity(Weighting):
    """One weight for all tokens of a step: a token's own label is noise to gate on, running means are not."""

    def __init__(self, settings: MaturityAlpha) -> None:
        self._settings = settings
        self._gap, self._divergence = GrowingMean(FAST), GrowingMean(FAST)
        self._fast, self._slow = GrowingMean(FAST), GrowingMean(SLOW)

    @property
    def gap(self) -> float:
        """Nats the teacher is ahead on batches neither has trained on."""
        return self._gap.value

    @property
    def trust(self) -> float:
        """E_label[log p/q] / E_p[log p/q], teacher p, student q: 1 if labels are drawn from p, -1 or less if from q.

        To second order in p - q the mixture (1 - w) q + w p predicts labels best at w = (1 + trust) / 2.
        """
        return self.gap / self._divergence.value if self._divergence.value > 0 else 0.0

    @property
    def growth(self) -> float:
        """What the teacher itself still learns, nats; 0 when it is frozen, or has stopped."""
        return max(0.0, fall(self._fast, self._slow))

    @property
    def maturity(self) -> float:
        """How much of what makes a teacher worth following it has, in [0, 1]; 0 where it is not ahead."""
        return min(1.0, max(0.0, self.gap / (self._settings.scale + self.growth)))

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        s = self._settings
        towards_truth = min(1.0, max(0.0, (1 + self.trust) / (1 + s.sure)))
        return torch.full_like(tokens.student_ce, s.peak * towards_truth * self.maturity)

    def update(self, stats: StepStats) -> None:
        self._gap.add(stats.gap)
        self._divergence.add(stats.divergence)
        self._fast.add(stats.teacher_ce)
        self._slow.add(stats.teacher_ce)

    def metrics(self) -> dict[str, float]:
        return {"gap": self.gap, "trust": self.trust, "growth": self.growth, "maturity": self.maturity}

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {name: mean.state_dict() for name, mean in self._means().items()}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        for name, mean in self._means().items():
            mean.load_state_dict(state[name])

    def _means(self) -> dict[str, GrowingMean]:
        return {"gap": self._gap, "divergence": self._divergence, "fast": self._fast, "slow": self._slow}
