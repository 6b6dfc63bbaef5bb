"""Soft and hard targets balanced by their gradients in the logits, u = soft and v = hard; no extra backward pass.

    norms:    alpha |u| = kappa (1 - alpha) |v|                      (GradNorm, 1711.02257, in closed form)
    mgda:     the mix of least norm, clip((v - u).v / |u - v|^2, 0, 1)            (MGDA, 1810.04650)
    surgery:  the sum after each part lost what opposes the other                 (PCGrad, 2001.06782)

weighting = Gradients(config.loss.weighting, steps=400)
"""

import torch

from distill.losses.token_stats import GradientProducts, TokenStats
from distill.weighting.interface import StepStats, Weighting
from distill.weighting.running_mean import RunningMean, horizon_of
from herd.run.weighting import GradientAlpha

NAMES = ("soft_square", "hard_square", "cross")
START = 0.5  # until a step has been seen, and where both parts are one
ROUNDING = 1e-6  # of squares and products in fp32, relative


class Gradients(Weighting):
    """Per token, or for all tokens of a step by the running means of u.u, v.v and u.v."""

    def __init__(self, settings: GradientAlpha, *, steps: int) -> None:
        self._settings = settings
        self._means = {name: RunningMean(horizon_of(settings.horizon, steps)) for name in NAMES}

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        products = tokens.products()  # asked for with `step` too: what is not asked for is not averaged
        if self._settings.over == "step":
            means = (products.soft.new_tensor(mean.value) for mean in self._means.values())
            return balanced(GradientProducts(*means), self._settings).expand_as(products.soft).clone()
        return balanced(products, self._settings)

    def update(self, stats: StepStats) -> None:
        for name, mean in self._means.items():
            mean.add(getattr(stats, name))

    def metrics(self) -> dict[str, float]:
        return {name: mean.value for name, mean in self._means.items()}

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {name: mean.state_dict() for name, mean in self._means.items()}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        for name, mean in self._means.items():
            mean.load_state_dict(state[name])


def balanced(products: GradientProducts, settings: GradientAlpha) -> torch.Tensor:
    """alpha by the rule, in [0, 1]; one half where it is not defined."""
    soft, hard, cross = products.soft, products.hard, products.cross
    if settings.rule == "norms":
        wanted, other = settings.kappa * hard.sqrt(), soft.sqrt()
    elif settings.rule == "mgda":
        wanted, other = (hard - cross).clamp_min(0), (soft - cross).clamp_min(0)
    else:
        opposed = (-cross).clamp_min(0)
        wanted, other = 1 + opposed / soft, 1 + opposed / hard
    both = wanted + other
    return torch.where(both > ROUNDING * (soft + hard), wanted / both, START)
