"""Half-quadratic quantisation (Badri and Shaji 2023): parameters that make the p-norm of the error small, no data.

    codes_ENK, parameters = Hqq().round(weight_ENK, grid, None)

min sum |w - s (q - z)|^p over the parameters, by turns: e <- shrink(w - s (q - z)), the errors taken as outliers, then
parameters fitted to w - e by least squares. Published for the zero alone; a symmetric grid has none, so there the scale
is fitted. Starts from round to nearest and keeps, for each group, the best parameters met. E, N, K, G, S as in
`method`, S weights in a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats.grid import Grid, Parameters
from quant.methods.method import Method


@dataclass(frozen=True)
class Hqq(Method):
    calibrated = False
    power: float = 0.7
    beta: float = 10.0
    """Weight of the quadratic term: larger means that fewer errors are taken as outliers."""
    growth: float = 1.01
    steps: int = 20

    def round(self, weight_ENK: Tensor, grid: Grid, hessian_EKK: Tensor | None) -> tuple[Tensor, Parameters]:
        best = grid.search(weight_ENK)
        current, beta = best, self.beta
        least_ENG = self.objective(weight_ENK, grid, best)
        for _ in range(self.steps):
            current = self._step(weight_ENK, grid, current, beta)
            beta *= self.growth
            error_ENG = self.objective(weight_ENK, grid, current)
            wins_ENG = error_ENG < least_ENG
            best = select(wins_ENG, current, best)
            least_ENG = torch.where(wins_ENG, error_ENG, least_ENG)
        return grid.encode(weight_ENK, best), best

    def objective(self, weight_ENK: Tensor, grid: Grid, parameters: Parameters) -> Tensor:
        """The sum of |error|^p of each group [E, N, G] when it is rounded to nearest."""
        error_ENK = weight_ENK.float() - grid.decode(grid.encode(weight_ENK, parameters), parameters).float()
        return error_ENK.abs().pow(self.power).unflatten(-1, (parameters.scale_NG.shape[-1], -1)).sum(-1)

    def _step(self, weight_ENK: Tensor, grid: Grid, parameters: Parameters, beta: float) -> Parameters:
        groups = parameters.scale_NG.shape[-1]
        weight_ENGS = weight_ENK.float().unflatten(-1, (groups, -1))
        codes_ENGS = grid.encode(weight_ENK, parameters).unflatten(-1, (groups, -1)).float()
        scale_ENG1 = parameters.scale_NG[..., None]
        zero_ENG1 = 0.0 if parameters.zero_NG is None else parameters.zero_NG[..., None].float()
        # Errors in units of the scale, so that one beta suits weights of any size.
        outlier_ENGS = self._shrink(weight_ENGS / scale_ENG1 - (codes_ENGS - zero_ENG1), beta) * scale_ENG1
        clean_ENGS = weight_ENGS - outlier_ENGS
        if parameters.zero_NG is not None:
            zero_ENG = (codes_ENGS - clean_ENGS / scale_ENG1).mean(-1).round().clamp(grid.lowest, grid.highest)
            return Parameters(parameters.scale_NG, zero_ENG.to(torch.int8))
        square_ENG = codes_ENGS.square().sum(-1)
        fitted_ENG = (codes_ENGS * clean_ENGS).sum(-1) / square_ENG.clamp(min=1)
        return Parameters(grid.storable(torch.where(square_ENG > 0, fitted_ENG, parameters.scale_NG)))

    def _shrink(self, error: Tensor, beta: float) -> Tensor:
        """The generalised soft threshold for the p-norm."""
        size = error.abs().clamp(min=1e-8)
        return error.sign() * (size - size.pow(self.power - 1) / beta).clamp(min=0)


def select(wins_ENG: Tensor, first: Parameters, second: Parameters) -> Parameters:
    """The first parameters where they win, the second elsewhere."""
    zero = None if first.zero_NG is None else torch.where(wins_ENG, first.zero_NG, second.zero_NG)
    return Parameters(torch.where(wins_ENG, first.scale_NG, second.scale_NG), zero)
