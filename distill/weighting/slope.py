"""The control: nudge the weight up and down between evaluations, keep what makes the held-out loss fall faster.

weighting = Slope(config.loss.weighting); weighting.see_heldout(step, nats)

It needs no theory and many evaluations: a probe is three stretches of run.evaluate_every steps.
"""

from typing import Any

import torch

from distill.losses.token_stats import TokenStats
from distill.weighting.interface import Weighting
from herd.run.weighting import SlopeAlpha


class Slope(Weighting):
    """A finite difference in time: the middle stretch against the mean of its neighbours, which have the other sign.

    Comparing with both neighbours takes out the slowing down that every run has.
    """

    def __init__(self, settings: SlopeAlpha) -> None:
        self._settings = settings
        self._middle, self._sign = settings.start, 1.0
        self._seen: list[list[float]] = []  # (step, held-out nats), the last four

    @property
    def value(self) -> float:
        return min(1.0, max(0.0, self._middle + self._sign * self._settings.probe))

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        return torch.full_like(tokens.student_ce, self.value)

    def see_heldout(self, step: int, nats: float) -> None:
        self._seen = [*self._seen, [step, nats]][-4:]
        if len(self._seen) == 4:
            before, middle, after = self._falls()
            # The stretch that just ended had this sign, the middle one the other.
            better = -self._sign if middle > (before + after) / 2 else self._sign
            self._middle = min(1.0, max(0.0, self._middle + better * self._settings.pace))
        self._sign = -self._sign

    def _falls(self) -> list[float]:
        """Nats per step by which the held-out loss fell in each of the last three stretches."""
        pairs = zip(self._seen[:-1], self._seen[1:], strict=True)
        return [(first - second) / (end - start) for (start, first), (end, second) in pairs]

    def metrics(self) -> dict[str, float]:
        return {"middle": self._middle}

    def state_dict(self) -> dict[str, Any]:
        return {"middle": self._middle, "sign": self._sign, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._middle, self._sign, self._seen = state["middle"], state["sign"], state["seen"]
