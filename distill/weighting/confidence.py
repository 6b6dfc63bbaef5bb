"""Hard targets where the teacher is sure, soft ones where it hesitates: 1 - max p, or H(p) / log V, per token.

weighting = Confidence(config.loss.weighting)          Source: the two uncertainty weights of Bridge-Garden.
"""

import math

import torch

from distill.losses.token_stats import TokenStats
from distill.weighting.interface import Weighting
from herd.run.weighting import ConfidenceAlpha


class Confidence(Weighting):
    """Known before the label is; with sparse targets from what the teacher measured on its whole distribution."""

    def __init__(self, settings: ConfidenceAlpha) -> None:
        self._measure = settings.measure

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        if self._measure == "peak":
            return (1 - tokens.teacher_peak).clamp(0, 1)
        return (tokens.teacher_entropy / math.log(tokens.vocabulary)).clamp(0, 1)
