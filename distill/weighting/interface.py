"""What a soft/hard weight is: per-token statistics in, alpha in [0, 1] out, one update a step.

A weighting sees a token only through `TokenStats` and the past only through `StepStats`, so it works with any
teacher and any form of target. All ranks hold the same state, because StepStats are global.
"""

from dataclasses import dataclass
from typing import Any

import torch

from distill.losses.token_stats import TokenStats


@dataclass(frozen=True, kw_only=True)
class Means:
    """Means over some tokens that have a soft target, on all ranks, in nats where nothing else is said."""

    count: float = 0.0
    """Tokens; with none all means are 0."""
    student_ce: float = 0.0
    teacher_ce: float = 0.0
    divergence: float = 0.0
    """KL(teacher || student) at the loss's temperature, whichever divergence is trained."""
    distillation: float = 0.0
    """The divergence that is trained, without the temperature's square."""
    teacher_entropy: float = 0.0
    alpha: float = 0.0
    teacher_square: float = 0.0
    """Sum of p^2. This and what follows is 0 unless `alpha` asks its tokens for it."""
    soft_square: float = 0.0
    hard_square: float = 0.0
    cross: float = 0.0
    label_mass: float = 0.0
    """p(label) at temperature 1."""

    @property
    def gap(self) -> float:
        """Nats by which the teacher is ahead on labels neither model has been trained on yet."""
        return self.student_ce - self.teacher_ce


@dataclass(frozen=True, kw_only=True)
class StepStats(Means):
    """Means over one optimiser step."""

    step: int
    """0 for the student's first step."""
    bins: tuple[Means, ...] = ()
    """The same by teacher entropy: distill.weighting.entropy_bins."""


class Weighting:
    """One design of the dynamic weight. What is not overridden knows no past."""

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        """Weight of the soft target for each token [C], in [0, 1], in the dtype of the statistics."""
        raise NotImplementedError

    def update(self, stats: StepStats) -> None:
        """Learn from the step that was just taken, some of whose tokens had a target."""

    def pass_over(self, step: int) -> None:
        """Note a step in which no token had one: there is nothing to learn from it but the time."""

    def see_heldout(self, step: int, nats: float) -> None:
        """Learn from the student's held-out cross-entropy after `step` steps of its own."""

    def metrics(self) -> dict[str, float]:
        """Internal state worth a curve."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything `alpha` depends on, as plain JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
