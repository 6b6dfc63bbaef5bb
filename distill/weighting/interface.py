"""What a soft/hard weight is: per-token statistics in, alpha in [0, 1] out, one update a step.

A weighting sees a token only through `TokenStats` and the past only through `StepStats`, so it works with any
teacher and any form of target. All ranks hold the same state, because StepStats are global.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from distill.losses.token_stats import TokenStats


@dataclass(frozen=True)
class StepStats:
    """Means over all valid tokens of one optimiser step, on all ranks, in nats."""

    step: int
    """0 for the student's first step."""
    student_ce: float
    teacher_ce: float
    divergence: float
    """KL(teacher || student) at the loss's temperature, whichever divergence is trained."""


class Weighting(Protocol):
    """One design of the dynamic weight."""

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        """Weight of the soft target for each token [C], in [0, 1], in the dtype of the statistics."""
        ...

    def update(self, stats: StepStats) -> None:
        """Learn from the step that was just taken."""
        ...

    def metrics(self) -> dict[str, float]:
        """Internal state worth a curve."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything `alpha` depends on, as plain JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        ...
