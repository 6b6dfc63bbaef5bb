"""Rounding learned by sign gradients (after AutoRound, Cheng et al. 2023), on each layer's own output error.

    codes_ENK, parameters = SignRound().round(weight_ENK, grid, hessian_EKK)

w_q = s clip(round(w / s + V)), s = stored(a s0): offsets V in [-1/2, 1/2] for every weight and a factor a for every
group follow the sign of the gradient of e H e^T, which passes the rounding unchanged, at a step that falls to zero. The
best codes met are kept, row by row, round to nearest among them. AutoRound minimises the output of a whole block of
layers; the Hessian says the same of one layer, without its inputs. E, N, K, G as in `method`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats.grid import Grid, Parameters
from quant.methods.hqq import select
from quant.methods.method import Method, importance, output_error, per_column


@dataclass(frozen=True)
class SignRound(Method):
    steps: int = 200
    scale_range: float = 0.1
    """Scales stay within this share of those that the search found."""

    def round(self, weight_ENK: Tensor, grid: Grid, hessian_EKK: Tensor | None) -> tuple[Tensor, Parameters]:
        weight_ENK = weight_ENK.float()
        start = grid.search(weight_ENK, importance(hessian_EKK))
        best, best_ENK = start, grid.encode(weight_ENK, start)
        least_EN = output_error(weight_ENK - grid.decode(best_ENK, best).float(), hessian_EKK)
        offset_ENK = torch.zeros_like(weight_ENK)
        factor_ENG = torch.ones_like(start.scale_NG)
        for step in range(self.steps):
            current = Parameters(grid.storable(start.scale_NG * factor_ENG), start.zero_NG)
            codes_ENK, inside_ENK = self._encode(weight_ENK, grid, current, offset_ENK)
            value_ENK = grid.decode(codes_ENK, current).float()
            error_ENK = weight_ENK - value_ENK
            pull_ENK = error_ENK @ hessian_EKK  # minus half the gradient with respect to the value
            error_EN = (pull_ENK * error_ENK).sum(-1)
            wins_EN = error_EN < least_EN
            best_ENK = torch.where(wins_EN[..., None], codes_ENK, best_ENK)
            best = select(wins_EN[..., None].expand_as(current.scale_NG), current, best)
            least_EN = torch.where(wins_EN, error_EN, least_EN)
            rate = (1 - step / self.steps) / self.steps
            scale_ENK = per_column(current.scale_NG, weight_ENK.shape[-1])
            # d value / d V = s inside the range; d value / d a = value less what V moves, over a.
            offset_ENK.add_(pull_ENK.mul(scale_ENK * inside_ENK).sign_(), alpha=rate).clamp_(-0.5, 0.5)
            slope_ENG = (pull_ENK * value_ENK).unflatten(-1, (factor_ENG.shape[-1], -1)).sum(-1)
            factor_ENG.add_(slope_ENG.sign_(), alpha=rate).clamp_(1 - self.scale_range, 1 + self.scale_range)
        return best_ENK, best

    def _encode(
        self, weight_ENK: Tensor, grid: Grid, parameters: Parameters, offset_ENK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Codes with offsets, and where they lie inside the range."""
        scale_ENK = per_column(parameters.scale_NG, weight_ENK.shape[-1])
        wanted_ENK = weight_ENK / scale_ENK + offset_ENK
        if parameters.zero_NG is not None:
            wanted_ENK += per_column(parameters.zero_NG, weight_ENK.shape[-1])
        codes_ENK = wanted_ENK.round().clamp(grid.lowest, grid.highest)
        return codes_ENK.to(torch.int8), (wanted_ENK > grid.lowest - 0.5) & (wanted_ENK < grid.highest + 0.5)
