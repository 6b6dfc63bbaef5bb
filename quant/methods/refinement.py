"""Codes and scales made better by turns: scales fitted to the codes, then each code to all others (coordinate descent).

    codes_ENK, parameters = refine(weight_ENK, codes_ENK, parameters, objective, grid, rounds=3)

Neither ever raises a row's cost (`objectives`). E, N, K, G as in `method`, S weights of a group, B columns of a block.
"""

import torch
from torch import Tensor

from quant.formats.grid import Grid, Parameters
from quant.methods.method import per_column
from quant.methods.objectives import Objective

BLOCK = 32
SYSTEM_BYTES = 1 << 28  # of the systems solved at one time
RIDGE = 1e-4  # share of the mean diagonal, for rows some of whose groups hold zeros only


def refine(
    weight_ENK: Tensor, codes_ENK: Tensor, parameters: Parameters, objective: Objective, grid: Grid, *, rounds: int
) -> tuple[Tensor, Parameters]:
    """Both in turn, so many times."""
    for _ in range(rounds):
        parameters = refit_scales(weight_ENK, codes_ENK, parameters, objective, grid)
        codes_ENK = descend(weight_ENK, codes_ENK, parameters, objective, grid)
    return codes_ENK, parameters


def refit_scales(
    weight_ENK: Tensor, codes_ENK: Tensor, parameters: Parameters, objective: Objective, grid: Grid
) -> Parameters:
    """The scales that cost each row least for given codes, as stored; old ones where those are no better."""
    layers, rows, _ = weight_ENK.shape
    groups = parameters.scale_NG.shape[-1]
    step = max(1, SYSTEM_BYTES // (4 * layers * groups * groups))
    fitted = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes_ENK_part = _centred(codes_ENK[:, part], take(parameters, slice(None), part))
        fitted.append(_fit(weight_ENK[:, part], codes_ENK_part, parameters.scale_NG[:, part], objective, part))
    found = Parameters(grid.storable(torch.cat(fitted, 1)), parameters.zero_NG)
    before_EN = objective.cost(weight_ENK - grid.decode(codes_ENK, parameters).float())
    after_EN = objective.cost(weight_ENK - grid.decode(codes_ENK, found).float())
    scale_ENG = torch.where((after_EN < before_EN)[..., None], found.scale_NG, parameters.scale_NG)
    return Parameters(scale_ENG, parameters.zero_NG)


def descend(weight_ENK: Tensor, codes_ENK: Tensor, parameters: Parameters, objective: Objective, grid: Grid) -> Tensor:
    """Every code once set to the best one given all other codes of its row, columns that count most first."""
    columns = weight_ENK.shape[-1]
    codes_ENK = codes_ENK.clone()
    error_ENK = weight_ENK - grid.decode(codes_ENK, parameters).float()
    pulls = objective.pulls(error_ENK)
    groups_K = torch.arange(columns) // (columns // parameters.scale_NG.shape[-1])
    for index_B in objective.order().split(BLOCK):
        curve_ENBB = objective.curvature(index_B)
        pull_ENB, error_ENB = pulls.read(index_B), error_ENK[:, :, index_B]
        before_ENB = error_ENB.clone()
        for at, k in enumerate(index_B.tolist()):
            one = _group(parameters, int(groups_K[k]))
            curve_EN1 = curve_ENBB[:, :, at, at, None]
            # Of all real errors of this column the best is e - (e H)_k / H_kk; the grid decides which is had.
            rest_EN1 = pull_ENB[:, :, at : at + 1] / curve_EN1.clamp(min=torch.finfo(torch.float32).tiny)
            weight_EN1 = weight_ENK[:, :, k : k + 1]
            code_EN1 = grid.encode(weight_EN1 - (error_ENB[:, :, at : at + 1] - rest_EN1), one)
            moved_EN1 = weight_EN1 - grid.decode(code_EN1, one).float() - error_ENB[:, :, at : at + 1]
            # A decoded value is rounded once more, so that the nearest code need not be the best.
            gains_EN1 = moved_EN1 * (2 * pull_ENB[:, :, at : at + 1] + moved_EN1 * curve_EN1) < 0
            moved_EN1 = torch.where(gains_EN1, moved_EN1, 0.0)
            codes_ENK[:, :, k : k + 1] = torch.where(gains_EN1, code_EN1, codes_ENK[:, :, k : k + 1])
            error_ENB[:, :, at : at + 1] += moved_EN1
            pull_ENB += moved_EN1 * curve_ENBB[:, :, at]
        error_ENK[:, :, index_B] = error_ENB
        pulls.move(index_B, error_ENB - before_ENB)
    return codes_ENK


def _fit(weight_ENK: Tensor, codes_ENK: Tensor, scale_ENG: Tensor, objective: Objective, rows: slice) -> Tensor:
    """Least squares of a row's scales s: minimise the cost of w - sum_g s_g q_g over s."""
    system_ENGG, wanted_ENG = objective.system(codes_ENK.unflatten(-1, (scale_ENG.shape[-1], -1)), weight_ENK, rows)
    # Solved for the change of the scales, so that the ridge draws them to where they are.
    missing_ENG = wanted_ENG - (system_ENGG @ scale_ENG[..., None])[..., 0]
    diagonal_ENG = system_ENGG.diagonal(dim1=-2, dim2=-1)
    ridge_EN1 = RIDGE * diagonal_ENG.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    system_ENGG += torch.diag_embed(ridge_EN1.expand_as(diagonal_ENG))
    change_ENG = torch.linalg.solve_ex(system_ENGG, missing_ENG[..., None])[0][..., 0]
    return torch.where(change_ENG.isfinite(), scale_ENG + change_ENG, scale_ENG)


def take(parameters: Parameters, layers: slice | Tensor, rows: slice) -> Parameters:
    """The parameters of some rows of some layers."""
    zero = None if parameters.zero_NG is None else parameters.zero_NG[layers, rows]
    return Parameters(parameters.scale_NG[layers, rows], zero)


def _centred(codes_ENK: Tensor, parameters: Parameters) -> Tensor:
    """Codes less their zeros, fp32."""
    if parameters.zero_NG is None:
        return codes_ENK.float()
    return codes_ENK.float() - per_column(parameters.zero_NG, codes_ENK.shape[-1])


def _group(parameters: Parameters, group: int) -> Parameters:
    """The parameters of one group of every row [E, N, 1]."""
    zero = None if parameters.zero_NG is None else parameters.zero_NG[..., group : group + 1]
    return Parameters(parameters.scale_NG[..., group : group + 1], zero)
