"""Half-quadratic quantisation (Badri and Shaji 2023): parameters that make the p-norm of the error small, no data.

    codes_ENK, parameters = Hqq().round(weight_ENK, grid, None)

min sum |w - s (q - z)|^p over the parameters, by turns: the outliers e <- shrink(w - s (q - z)), then parameters fitted
to w - e by least squares. Published for a real zero alone; here zeros are integers, or absent, so the scale is fitted
too. Starts from round to nearest and keeps, for each group, the best parameters met. E, N, K, G, S as in
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
        scale_ENG, beta = best.scale_NG, self.beta
        zero_ENG = torch.zeros_like(scale_ENG) if best.zero_NG is None else best.zero_NG.float()
        least_ENG = self.objective(weight_ENK, grid, best)
        for _ in range(self.steps):
            scale_ENG, zero_ENG = self.step(weight_ENK, grid, scale_ENG, zero_ENG, beta)
            beta *= self.growth
            current = Parameters(scale_ENG, None if grid.symmetric else zero_ENG.round().to(torch.int8))
            error_ENG = self.objective(weight_ENK, grid, current)
            wins_ENG = error_ENG < least_ENG
            best = select(wins_ENG, current, best)
            least_ENG = torch.where(wins_ENG, error_ENG, least_ENG)
        return grid.encode(weight_ENK, best), best

    def objective(self, weight_ENK: Tensor, grid: Grid, parameters: Parameters) -> Tensor:
        """The sum of |error|^p of each group [E, N, G] when it is rounded to nearest."""
        error_ENK = weight_ENK.float() - grid.decode(grid.encode(weight_ENK, parameters), parameters).float()
        return error_ENK.abs().pow(self.power).unflatten(-1, (parameters.scale_NG.shape[-1], -1)).sum(-1)

    def step(
        self, weight_ENK: Tensor, grid: Grid, scale_ENG: Tensor, zero_ENG: Tensor, beta: float
    ) -> tuple[Tensor, Tensor]:
        """The next scales, as stored, and zeros, which stay real numbers between steps."""
        weight_ENGS = weight_ENK.float().unflatten(-1, (scale_ENG.shape[-1], -1)) / scale_ENG[..., None]
        codes_ENGS = (weight_ENGS + zero_ENG[..., None]).round().clamp(grid.lowest, grid.highest)
        # Errors in units of the scale, so that one beta suits weights of any size.
        clean_ENGS = weight_ENGS - self._shrink(weight_ENGS - (codes_ENGS - zero_ENG[..., None]), beta)
        if not grid.symmetric:
            zero_ENG = (codes_ENGS - clean_ENGS).mean(-1).clamp(grid.lowest, grid.highest)
        centred_ENGS = codes_ENGS - zero_ENG.round()[..., None]
        square_ENG = centred_ENGS.square().sum(-1)
        change_ENG = (centred_ENGS * clean_ENGS).sum(-1) / square_ENG.clamp(min=1)
        return grid.storable(torch.where(square_ENG > 0, scale_ENG * change_ENG, scale_ENG)), zero_ENG

    def _shrink(self, error: Tensor, beta: float) -> Tensor:
        """The generalised soft threshold for the p-norm."""
        size = error.abs().clamp(min=1e-8)
        return error.sign() * (size - size.pow(self.power - 1) / beta).clamp(min=0)


def select(wins_ENG: Tensor, first: Parameters, second: Parameters) -> Parameters:
    """The first parameters where they win, the second elsewhere."""
    zero = None if first.zero_NG is None else torch.where(wins_ENG, first.zero_NG, second.zero_NG)
    return Parameters(torch.where(wins_ENG, first.scale_NG, second.scale_NG), zero)
