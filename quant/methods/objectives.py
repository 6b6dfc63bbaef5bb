"""What an error of the weights costs each output channel: a quadratic form, by which codes and scales are refined.

    Plain(hessian_EKK).cost(error_ENK)            # e H e^T, the same H for all rows of a layer
    Gated(input_nK, weight_nN, hessian_KK).cost(error_1NK)      # every row its own, never formed

E, N, K, G as in `method`, S weights of a group, B columns of a block, n tokens.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from quant.methods.method import output_error

PLAIN_SHARE = 0.25  # of the plain Hessian in a row's own, at least: what few tokens cannot tell is not believed
RIDGE = 0.05  # added to the diagonal, as a share of its mean, as `Gptq.damping`


class Pulls(ABC):
    """(e H)_k of every row while its errors e move: half of what the cost gains by an error of column k."""

    @abstractmethod
    def read(self, index_B: Tensor) -> Tensor:
        """Those of a block of columns [E, N, B]; a copy."""

    @abstractmethod
    def move(self, index_B: Tensor, change_ENB: Tensor) -> None:
        """The errors of these columns have changed."""


class Objective(ABC):
    @abstractmethod
    def cost(self, error_ENK: Tensor) -> Tensor:
        """Of every row [E, N]."""

    @abstractmethod
    def order(self) -> Tensor:
        """Columns K by how much they count, most first."""

    @abstractmethod
    def curvature(self, index_B: Tensor) -> Tensor:
        """H of a block of columns [E, N, B, B], or [E, 1, B, B] where rows have it in common."""

    @abstractmethod
    def pulls(self, error_ENK: Tensor) -> Pulls:
        """Kept up to date from these errors on."""

    @abstractmethod
    def system(self, codes_ENGS: Tensor, weight_ENK: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """q_g H q_h^T [E, N, G, G] and q_g H w^T [E, N, G]: the scales that fit the codes best solve it.

        codes_ENGS and weight_ENK are those of the given rows alone.
        """


class Plain(Objective):
    """e H e^T with a Hessian for each layer."""

    def __init__(self, hessian_EKK: Tensor):
        self._hessian_EKK = hessian_EKK

    def cost(self, error_ENK: Tensor) -> Tensor:
        return output_error(error_ENK, self._hessian_EKK)

    def order(self) -> Tensor:
        diagonal_K = self._hessian_EKK.diagonal(dim1=-2, dim2=-1).mean(0)
        return torch.argsort(diagonal_K, descending=True, stable=True)

    def curvature(self, index_B: Tensor) -> Tensor:
        return self._hessian_EKK[:, index_B][:, None, :, index_B]

    def pulls(self, error_ENK: Tensor) -> "PlainPulls":
        return PlainPulls(error_ENK, self._hessian_EKK)

    def system(self, codes_ENGS: Tensor, weight_ENK: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        groups, size = codes_ENGS.shape[2:]
        system_ENGG = codes_ENGS.new_empty(*codes_ENGS.shape[:3], groups)
        for group in range(groups):
            rows_ESK = self._hessian_EKK[:, group * size : (group + 1) * size]
            spread_ENGS = (codes_ENGS[:, :, group] @ rows_ESK).unflatten(-1, (groups, size))
            system_ENGG[:, :, group] = (spread_ENGS * codes_ENGS).sum(-1)
        wanted_ENG = ((weight_ENK @ self._hessian_EKK).unflatten(-1, (groups, size)) * codes_ENGS).sum(-1)
        return system_ENGG, wanted_ENG


class PlainPulls(Pulls):
    def __init__(self, error_ENK: Tensor, hessian_EKK: Tensor):
        self._hessian_EKK = hessian_EKK
        self._pull_ENK = error_ENK @ hessian_EKK

    def read(self, index_B: Tensor) -> Tensor:
        return self._pull_ENK[:, :, index_B]

    def move(self, index_B: Tensor, change_ENB: Tensor) -> None:
        self._pull_ENK += change_ENB @ self._hessian_EKK[:, index_B]


class Gated(Objective):
    """The mean over tokens of a weight for each row times the squared error of its output, drawn to the plain cost.

    Of one layer (E = 1). H_n = (1 - p) mean_t(w_tn x_t x_t^T) + p H + a ridge, w scaled to a mean of one in every row.
    p is PLAIN_SHARE, and more where tokens are few: the plain Hessian counts as K of them.
    """

    def __init__(self, input_nK: Tensor, weight_nN: Tensor, hessian_KK: Tensor):
        tokens, columns = input_nK.shape
        share = max(PLAIN_SHARE, columns / (tokens + columns))
        mean_N = weight_nN.mean(0).clamp(min=torch.finfo(torch.float32).tiny)
        self._input_nK = input_nK
        self._weight_nN = weight_nN / mean_N * ((1 - share) / tokens)
        self._plain_KK = share * hessian_KK
        trace_N = self._weight_nN.T @ input_nK.square().sum(1) + self._plain_KK.diagonal().sum()
        self._ridge_N = RIDGE / columns * trace_N
        self._curvatures: dict[int, Tensor] = {}

    def cost(self, error_ENK: Tensor) -> Tensor:
        error_NK = error_ENK[0]
        output_nN = self._input_nK @ error_NK.T
        cost_N = (self._weight_nN * output_nN.square()).sum(0) + (error_NK * self._spread(error_NK)).sum(1)
        return cost_N[None]

    def order(self) -> Tensor:
        return torch.argsort(self._plain_KK.diagonal(), descending=True, stable=True)

    def curvature(self, index_B: Tensor) -> Tensor:
        first = int(index_B[0])
        if first not in self._curvatures:
            self._curvatures[first] = self._curvature(index_B)
        return self._curvatures[first]

    def pulls(self, error_ENK: Tensor) -> "GatedPulls":
        return GatedPulls(self, error_ENK[0])

    def system(self, codes_ENGS: Tensor, weight_ENK: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        codes_NGS, weight_NK = codes_ENGS[0], weight_ENK[0]
        groups, size = codes_NGS.shape[1:]
        inputs = self._input_nK.split(size, 1)
        outputs_NGn = torch.stack([codes_NGS[:, g] @ input_nS.T for g, input_nS in enumerate(inputs)], 1)
        weighted_NGn = outputs_NGn * self._weight_nN.T[rows, None]
        system_NGG = weighted_NGn @ outputs_NGn.mT
        wanted_NG = (weighted_NGn @ (weight_NK @ self._input_nK.T)[..., None])[..., 0]
        wanted_NG += (self._spread(weight_NK, rows).unflatten(1, (groups, size)) * codes_NGS).sum(-1)
        for group in range(groups):
            spread_NK = codes_NGS[:, group] @ self._plain_KK[group * size : (group + 1) * size]
            system_NGG[:, group] += (spread_NK.unflatten(1, (groups, size)) * codes_NGS).sum(-1)
            system_NGG[:, group, group] += self._ridge_N[rows] * codes_NGS[:, group].square().sum(-1)
        return system_NGG[None], wanted_NG[None]

    def _spread(self, error_NK: Tensor, rows: slice = slice(None)) -> Tensor:
        """Errors times all of H but what the tokens weigh."""
        return error_NK @ self._plain_KK + self._ridge_N[rows, None] * error_NK

    def _curvature(self, index_B: Tensor) -> Tensor:
        # One product for all rows: that of the weights with every product of two columns.
        first_P, second_P = torch.triu_indices(len(index_B), len(index_B))
        input_nB = self._input_nK[:, index_B]
        curve_NP = self._weight_nN.T @ (input_nB[:, first_P] * input_nB[:, second_P])
        curve_NBB = self._plain_KK[index_B][:, index_B].expand(len(curve_NP), -1, -1).clone()
        curve_NBB[:, first_P, second_P] += curve_NP
        curve_NBB[:, second_P, first_P] += torch.where(first_P == second_P, 0.0, curve_NP)
        curve_NBB.diagonal(dim1=1, dim2=2).add_(self._ridge_N[:, None])
        return curve_NBB[None]


class GatedPulls(Pulls):
    def __init__(self, objective: Gated, error_NK: Tensor):
        self._of = objective
        self._output_nN = objective._input_nK @ error_NK.T
        self._spread_NK = objective._spread(error_NK)

    def read(self, index_B: Tensor) -> Tensor:
        pull_NB = (self._of._weight_nN * self._output_nN).T @ self._of._input_nK[:, index_B]
        return (pull_NB + self._spread_NK[:, index_B])[None]

    def move(self, index_B: Tensor, change_ENB: Tensor) -> None:
        change_NB = change_ENB[0]
        self._output_nN += self._of._input_nK[:, index_B] @ change_NB.T
        self._spread_NK += change_NB @ self._of._plain_KK[index_B]
        self._spread_NK[:, index_B] += self._of._ridge_N[:, None] * change_NB
