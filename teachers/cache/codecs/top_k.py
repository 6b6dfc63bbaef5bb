"""Top-k with a bucket: the k largest masses, and what is left of one for all other classes together.

Biased only in what it says nothing about: how the bucket is spread. Suffix legend: C tokens, K classes.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from teachers.cache.codecs.distributions import Distributions
from teachers.cache.codecs.picks import Picks
from teachers.cache.codecs.rounding import round_to_units
from teachers.targets import Tail

UNITS = 4096
"""Parts a token's mass is counted in; rounding is unbiased, a class that gets none is left out."""


@dataclass(frozen=True)
class TopK:
    """`size` is k, at most the vocabulary."""

    size: int
    name: ClassVar[str] = "top_k"
    tail: ClassVar[Tail] = "bucket"
    uniforms: ClassVar[int] = 1

    def pick(self, chunk: Distributions, uniforms_CP: np.ndarray) -> Picks:
        """Keep the k largest classes of every token."""
        values_CK, ids_CK = chunk.largest(self.size)
        rest_C1 = (1 - values_CK.sum(-1, keepdim=True)).clamp_min(0)
        u_C = torch.from_numpy(uniforms_CP[:, 0]).to(values_CK.device)
        units_CK = round_to_units(torch.cat([values_CK, rest_C1], 1), total=UNITS, uniforms_C=u_C)[:, :-1]
        return Picks.own(units_CK, ids_CK, total=UNITS)
