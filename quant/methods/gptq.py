"""GPTQ (Frantar et al. 2022): columns are rounded one by one, and those that follow make good the output error so far.

    codes_ENK, parameters = Gptq().round(weight_ENK, grid, hessian_EKK)

Many layers of one shape at a time (the experts of a bank): one batched Cholesky, one sweep over the columns. Scales are
searched beforehand, in the weights' own groups, with errors counted by the size of a channel's inputs; columns are
visited by falling diagonal of the Hessian ("static activation order": nothing of the order is stored).
E, N, K, G as in `method`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats.grid import Grid, Parameters
from quant.methods.method import Method, importance, output_error, per_column
from quant.methods.objectives import Plain
from quant.methods.refinement import refine

BLOCK = 32


@dataclass(frozen=True)
class Gptq(Method):
    corrects = True
    damping: float = 0.05
    """Added to the Hessian's diagonal, as a share of its mean: what few tokens cannot tell is not believed."""
    rounds: int = 3
    """Times that scales are fitted to the codes and codes to each other afterwards (`refinement`)."""

    def round(self, weight_ENK: Tensor, grid: Grid, hessian_EKK: Tensor | None) -> tuple[Tensor, Parameters]:
        weight_ENK, hessian_EKK = weight_ENK.float(), damped(hessian_EKK, self.damping)
        parameters = grid.search(weight_ENK, importance(hessian_EKK))
        codes_ENK = self.sweep(weight_ENK, grid, parameters, hessian_EKK)
        return refine(weight_ENK, codes_ENK, parameters, Plain(hessian_EKK), grid, rounds=self.rounds)

    def sweep(self, weight_ENK: Tensor, grid: Grid, parameters: Parameters, hessian_EKK: Tensor) -> Tensor:
        """Codes for given parameters, by one sweep over the columns with an already damped Hessian.

        A row whose output error is then no smaller than that of rounding to nearest is rounded to nearest.
        """
        nearest_ENK = grid.encode(weight_ENK, parameters)
        order_EK = torch.argsort(hessian_EKK.diagonal(dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)
        factor_EKK = inverse_factor(_reorder(hessian_EKK, order_EK))
        codes_ENK = torch.empty_like(nearest_ENK)
        place_ENK = order_EK[:, None].expand(weight_ENK.shape)
        swept_ENK = _sweep_columns(weight_ENK.gather(2, place_ENK), grid, _columns(parameters, place_ENK), factor_EKK)
        codes_ENK.scatter_(2, place_ENK, swept_ENK)
        worse_EN = _error(weight_ENK, grid, codes_ENK, parameters, hessian_EKK) >= _error(
            weight_ENK, grid, nearest_ENK, parameters, hessian_EKK
        )
        return torch.where(worse_EN[..., None], nearest_ENK, codes_ENK)


def damped(hessian_EKK: Tensor, damping: float) -> Tensor:
    """The Hessian with a share of its mean diagonal added to the diagonal; the identity for one of zeros."""
    diagonal_EK = hessian_EKK.diagonal(dim1=-2, dim2=-1)
    added_E = damping * diagonal_EK.mean(-1)
    added_E = torch.where(added_E > 0, added_E, 1.0)
    return hessian_EKK + torch.diag_embed(added_E[:, None].expand_as(diagonal_EK))


def inverse_factor(hessian_EKK: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse [E, K, K], fp32; worked out in float64 where fp32 fails.

    A matrix that is not positive definite in float64 either gives the identity, which is rounding to nearest.
    """
    factor_EKK, failed_E = _factor(hessian_EKK)
    if failed_E.any():
        exact_EKK, hopeless_E = _factor(hessian_EKK[failed_E].double())
        identity_KK = torch.eye(hessian_EKK.shape[-1], dtype=torch.float64)
        exact_EKK = torch.where(hopeless_E[:, None, None], identity_KK, exact_EKK)
        factor_EKK[failed_E] = exact_EKK.to(factor_EKK.dtype)
    return factor_EKK


def _factor(hessian_EKK: Tensor) -> tuple[Tensor, Tensor]:
    """The factor, and for which matrices it failed."""
    lower_EKK, first_E = torch.linalg.cholesky_ex(hessian_EKK)
    inverse_EKK = torch.cholesky_inverse(lower_EKK)
    upper_EKK, second_E = torch.linalg.cholesky_ex(inverse_EKK, upper=True)
    failed_E = (first_E != 0) | (second_E != 0) | ~upper_EKK.isfinite().all(-1).all(-1)
    return upper_EKK, failed_E


def _reorder(matrix_EKK: Tensor, order_EK: Tensor) -> Tensor:
    rows_EKK = matrix_EKK.gather(1, order_EK[:, :, None].expand_as(matrix_EKK))
    return rows_EKK.gather(2, order_EK[:, None].expand_as(matrix_EKK))


def _columns(parameters: Parameters, place_ENK: Tensor) -> Parameters:
    """Parameters of every column, in the order of the sweep: a grid of groups of one weight."""
    columns = place_ENK.shape[-1]
    scale_ENK = per_column(parameters.scale_NG, columns).gather(2, place_ENK)
    if parameters.zero_NG is None:
        return Parameters(scale_ENK)
    return Parameters(scale_ENK, per_column(parameters.zero_NG, columns).gather(2, place_ENK).to(torch.int8))


def _sweep_columns(weight_ENK: Tensor, grid: Grid, columns: Parameters, factor_EKK: Tensor) -> Tensor:
    """Codes int8 [E, N, K]; weight_ENK is used up. Later blocks learn of a block's errors once it is done."""
    codes_ENK = torch.empty(weight_ENK.shape, dtype=torch.int8)
    for start in range(0, weight_ENK.shape[-1], BLOCK):
        block = slice(start, min(start + BLOCK, weight_ENK.shape[-1]))
        block_ENB = weight_ENK[:, :, block].clone()
        errors_ENB = torch.empty_like(block_ENB)
        for at in range(block_ENB.shape[-1]):
            k = start + at
            zero_EN1 = None if columns.zero_NG is None else columns.zero_NG[:, :, k : k + 1]
            one = Parameters(columns.scale_NG[:, :, k : k + 1], zero_EN1)
            weight_EN1 = block_ENB[:, :, at : at + 1]
            code_EN1 = grid.encode(weight_EN1, one)
            error_EN1 = (weight_EN1 - grid.decode(code_EN1, one).float()) / factor_EKK[:, k, k, None, None]
            codes_ENK[:, :, k : k + 1], errors_ENB[:, :, at : at + 1] = code_EN1, error_EN1
            block_ENB[:, :, at + 1 :] -= error_EN1 * factor_EKK[:, None, k, k + 1 : block.stop]
        weight_ENK[:, :, block.stop :] -= errors_ENB @ factor_EKK[:, block, block.stop :]
    return codes_ENK


def _error(weight_ENK: Tensor, grid: Grid, codes_ENK: Tensor, parameters: Parameters, hessian_EKK: Tensor) -> Tensor:
    return output_error(weight_ENK - grid.decode(codes_ENK, parameters).float(), hessian_EKK)
