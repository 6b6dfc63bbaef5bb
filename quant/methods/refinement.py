"""Codes and scales made better by turns: scales fitted to the codes, then each code to all others (coordinate descent).

    parameters = refit_scales(weight_ENK, codes_ENK, parameters, hessian_EKK, grid)      # least squares
    codes_ENK = descend(weight_ENK, codes_ENK, parameters, hessian_EKK, grid)            # one round of it

Neither ever raises the output error e H e^T of a row. E, N, K, G as in `method`, S weights of a group, B columns of a
block.
"""

import torch
from torch import Tensor

from quant.formats.grid import Grid, Parameters
from quant.methods.method import output_error, per_column

BLOCK = 128
SYSTEM_BYTES = 1 << 28  # of the systems solved at one time
RIDGE = 1e-4  # share of the mean diagonal, for rows some of whose groups hold zeros only


def refit_scales(
    weight_ENK: Tensor, codes_ENK: Tensor, parameters: Parameters, hessian_EKK: Tensor, grid: Grid
) -> Parameters:
    """The scales that minimise e H e^T of each row for given codes, as stored; old ones where those are no better."""
    layers, rows, _ = weight_ENK.shape
    groups = parameters.scale_NG.shape[-1]
    step = max(1, SYSTEM_BYTES // (4 * layers * groups * groups))
    fitted = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes_ENK_part = _centred(codes_ENK[:, part], _rows(parameters, part))
        fitted.append(_fit(weight_ENK[:, part], codes_ENK_part, parameters.scale_NG[:, part], hessian_EKK))
    found = Parameters(grid.storable(torch.cat(fitted, 1)), parameters.zero_NG)
    before_EN = output_error(weight_ENK - grid.decode(codes_ENK, parameters).float(), hessian_EKK)
    after_EN = output_error(weight_ENK - grid.decode(codes_ENK, found).float(), hessian_EKK)
    scale_ENG = torch.where((after_EN < before_EN)[..., None], found.scale_NG, parameters.scale_NG)
    return Parameters(scale_ENG, parameters.zero_NG)


def descend(weight_ENK: Tensor, codes_ENK: Tensor, parameters: Parameters, hessian_EKK: Tensor, grid: Grid) -> Tensor:
    """Every code once set to the best one given all other codes of its row, by falling diagonal of the mean Hessian."""
    columns = weight_ENK.shape[-1]
    order_K = torch.argsort(hessian_EKK.diagonal(dim1=-2, dim2=-1).mean(0), descending=True, stable=True)
    codes_ENK = codes_ENK.clone()
    error_ENK = weight_ENK - grid.decode(codes_ENK, parameters).float()
    pull_ENK = error_ENK @ hessian_EKK
    groups_K = torch.arange(columns) // (columns // parameters.scale_NG.shape[-1])
    for index_B in order_K.split(BLOCK):
        block_EBB = hessian_EKK[:, index_B][:, :, index_B]
        pull_ENB, error_ENB = pull_ENK[:, :, index_B], error_ENK[:, :, index_B]
        before_ENB = error_ENB.clone()
        for at, k in enumerate(index_B.tolist()):
            one = _group(parameters, int(groups_K[k]))
            curve_E11 = block_EBB[:, at, at, None, None]
            # Of all real errors of this column the best is e - (e H)_k / H_kk; the grid decides which is had.
            rest_EN1 = pull_ENB[:, :, at : at + 1] / curve_E11.clamp(min=torch.finfo(torch.float32).tiny)
            weight_EN1 = weight_ENK[:, :, k : k + 1]
            code_EN1 = grid.encode(weight_EN1 - (error_ENB[:, :, at : at + 1] - rest_EN1), one)
            moved_EN1 = weight_EN1 - grid.decode(code_EN1, one).float() - error_ENB[:, :, at : at + 1]
            # A decoded value is rounded once more, so that the nearest code need not be the best.
            gains_EN1 = moved_EN1 * (2 * pull_ENB[:, :, at : at + 1] + moved_EN1 * curve_E11) < 0
            moved_EN1 = torch.where(gains_EN1, moved_EN1, 0.0)
            codes_ENK[:, :, k : k + 1] = torch.where(gains_EN1, code_EN1, codes_ENK[:, :, k : k + 1])
            error_ENB[:, :, at : at + 1] += moved_EN1
            pull_ENB += moved_EN1 * block_EBB[:, at, None, :]
        error_ENK[:, :, index_B] = error_ENB
        pull_ENK += (error_ENB - before_ENB) @ hessian_EKK[:, index_B]
    return codes_ENK


def _fit(weight_ENK: Tensor, codes_ENK: Tensor, scale_ENG: Tensor, hessian_EKK: Tensor) -> Tensor:
    """Least squares of a row's scales s: minimise (w - sum_g s_g q_g) H (w - sum_g s_g q_g)^T over s."""
    groups = scale_ENG.shape[-1]
    codes_ENGS = codes_ENK.unflatten(-1, (groups, -1))
    size = codes_ENGS.shape[-1]
    system_ENGG = codes_ENK.new_empty(*codes_ENGS.shape[:3], groups)
    for group in range(groups):
        rows_ESK = hessian_EKK[:, group * size : (group + 1) * size]
        spread_ENGS = (codes_ENGS[:, :, group] @ rows_ESK).unflatten(-1, (groups, -1))
        system_ENGG[:, :, group] = (spread_ENGS * codes_ENGS).sum(-1)
    wanted_ENG = ((weight_ENK @ hessian_EKK).unflatten(-1, (groups, -1)) * codes_ENGS).sum(-1)
    # Solved for the change of the scales, so that the ridge draws them to where they are.
    missing_ENG = wanted_ENG - (system_ENGG @ scale_ENG[..., None])[..., 0]
    diagonal_ENG = system_ENGG.diagonal(dim1=-2, dim2=-1)
    ridge_EN1 = RIDGE * diagonal_ENG.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    system_ENGG += torch.diag_embed(ridge_EN1.expand_as(diagonal_ENG))
    change_ENG = torch.linalg.solve_ex(system_ENGG, missing_ENG[..., None])[0][..., 0]
    return torch.where(change_ENG.isfinite(), scale_ENG + change_ENG, scale_ENG)


def _centred(codes_ENK: Tensor, parameters: Parameters) -> Tensor:
    """Codes less their zeros, fp32."""
    if parameters.zero_NG is None:
        return codes_ENK.float()
    return codes_ENK.float() - per_column(parameters.zero_NG, codes_ENK.shape[-1])


def _rows(parameters: Parameters, part: slice) -> Parameters:
    zero = None if parameters.zero_NG is None else parameters.zero_NG[:, part]
    return Parameters(parameters.scale_NG[:, part], zero)


def _group(parameters: Parameters, group: int) -> Parameters:
    """The parameters of one group of every row [E, N, 1]."""
    zero = None if parameters.zero_NG is None else parameters.zero_NG[..., group : group + 1]
    return Parameters(parameters.scale_NG[..., group : group + 1], zero)
