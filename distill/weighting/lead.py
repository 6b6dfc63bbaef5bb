"""Listen to a teacher that is far ahead, as far as following it leads towards the truth.

    lead  = (CE_student - CE_teacher) / (rate at which CE_student falls), as a share of the run's steps
    trust = (CE_student - CE_teacher) / KL(teacher || student)
    alpha = peak * clip((lead - margin) / width, 0, 1) * clip((trust - doubt) / (1 - doubt), 0, 1)

Why two factors, and what they measured on good, young and immature teachers: docs/weighting.md.
"""

import torch

from distill.losses.token_stats import TokenStats
from distill.weighting.interface import StepStats, Weighting
from distill.weighting.running_mean import RunningMean, horizon_of
from herd.run.weighting import LeadAlpha

SLOW = 3  # the slow mean reaches this many times further back than the fast one


class Lead(Weighting):
    """One weight for all tokens of a step: a token's own label is noise to gate on, running means are not."""

    def __init__(self, settings: LeadAlpha, *, steps: int) -> None:
        self._settings, self._steps = settings, steps
        horizon = horizon_of(settings.horizon, steps)
        self._gap, self._divergence = RunningMean(horizon), RunningMean(horizon)
        self._fast, self._slow = RunningMean(horizon), RunningMean(SLOW * horizon)

    @property
    def gap(self) -> float:
        """Nats the teacher is ahead on batches neither has trained on."""
        return self._gap.value

    @property
    def rate(self) -> float:
        """Nats per step by which the student improves: two means of the same curve, one lagging behind the other."""
        lag = self._slow.age - self._fast.age
        return (self._slow.value - self._fast.value) / lag if lag > 0 else 0.0

    @property
    def lead(self) -> float:
        """Share of the run the student would need to be where the teacher is, 1 at most; 0 within the noise."""
        if self.gap <= self._settings.noise or self._slow.age == self._fast.age:
            return 0.0
        return min(1.0, self.gap / max(self.rate * self._steps, self.gap))

    @property
    def trust(self) -> float:
        """Share of the way from student to teacher that goes towards the truth.

        With p the teacher, q the student: E_label[log p/q] / E_p[log p/q]. If labels are drawn from p it is 1; a
        teacher with errors of its own is farther away in KL than it is ahead on labels.
        """
        return self.gap / self._divergence.value if self._divergence.value > 0 else 0.0

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        s = self._settings
        ahead = min(1.0, max(0.0, (self.lead - s.margin) / s.width))
        trusted = min(1.0, max(0.0, (self.trust - s.doubt) / (1 - s.doubt)))
        return torch.full_like(tokens.student_ce, s.peak * ahead * trusted)

    def update(self, stats: StepStats) -> None:
        self._gap.add(stats.gap)
        self._divergence.add(stats.divergence)
        self._fast.add(stats.student_ce)
        self._slow.add(stats.student_ce)

    def pass_over(self, step: int) -> None:
        self._fast.wait()
        self._slow.wait()

    def metrics(self) -> dict[str, float]:
        return {"gap": self.gap, "lead": self.lead, "trust": self.trust}

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {name: mean.state_dict() for name, mean in self._means().items()}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        for name, mean in self._means().items():
            mean.load_state_dict(state[name])

    def _means(self) -> dict[str, RunningMean]:
        return {"gap": self._gap, "divergence": self._divergence, "fast": self._fast, "slow": self._slow}
