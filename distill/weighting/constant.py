"""A weight that never changes: the strong baseline every other design has to beat.

weighting = Constant(0.5)
"""

import torch

from distill.losses.token_stats import TokenStats
from distill.weighting.interface import Weighting


class Constant(Weighting):
    """alpha everywhere, always."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        return torch.full_like(tokens.student_ce, self._alpha)
