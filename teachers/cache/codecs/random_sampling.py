"""RS-KD (arXiv 2503.16870): N independent draws from the teacher's distribution, kept as counts.

Unbiased, sums to one; E||t - p||^2 = (1 - sum p^2) / N. Suffix legend: C tokens, N draws.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from teachers.cache.codecs.distributions import Distributions
from teachers.cache.codecs.picks import Picks
from teachers.targets import Tail


@dataclass(frozen=True)
class RandomSampling:
    """`size` is the number of draws; the classes of a token are fewer where one is drawn again."""

    size: int
    name: ClassVar[str] = "rs_kd"
    tail: ClassVar[Tail] = "sampled"

    @property
    def uniforms(self) -> int:
        return self.size

    def pick(self, chunk: Distributions, uniforms_CP: np.ndarray) -> Picks:
        """Draw for every token."""
        ids_CN = chunk.at(torch.from_numpy(uniforms_CP).to(chunk.mass_CS.device)).sort(-1).values
        first_CN = torch.ones_like(ids_CN, dtype=torch.bool)
        first_CN[:, 1:] = ids_CN[:, 1:] != ids_CN[:, :-1]
        # How often a class was drawn, in the place of its first draw and zero in the others.
        group_CN = first_CN.long().cumsum(-1) - 1
        counts_CN = torch.zeros_like(ids_CN).scatter_add_(1, group_CN, torch.ones_like(ids_CN))
        units_CN = torch.where(first_CN, counts_CN.gather(1, group_CN), 0)
        return Picks.own(units_CN, ids_CN, total=self.size)
