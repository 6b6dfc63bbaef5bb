"""Round to nearest: the grid's own searched parameters.

codes_ENK, parameters = Rtn().round(weight_ENK, grid, None)
"""

from dataclasses import dataclass

from torch import Tensor

from quant.formats.grid import Grid, Parameters
from quant.methods.method import Method


@dataclass(frozen=True)
class Rtn(Method):
    calibrated = False

    def round(self, weight_ENK: Tensor, grid: Grid, hessian_EKK: Tensor | None) -> tuple[Tensor, Parameters]:
        parameters = grid.search(weight_ENK)
        return grid.encode(weight_ENK, parameters), parameters
