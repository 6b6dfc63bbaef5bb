"""What an error of the weights costs each output channel: a quadratic form, by which codes and scales are refined.

    Plain(hessian_EKK).cost(error_ENK)            # e H e^T, the same H for all rows of a layer
    Gated(inputs, weight_EnN, cross_EnN, hessian_EKK).cost(error_ENK)      # every row its own, never formed

E, N, K, G as in `method`, S weights of a group, B columns of a block, n tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

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


@dataclass
class Inputs:
    """What layers met: value_EnK [E, n, K], zero after the first tokens_E of a layer."""

    value_EnK: Tensor
    tokens_E: Tensor
    _columns: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def columns(self, index_B: Tensor) -> Tensor:
        """A block of them [E, n, B]. The same blocks come again and again: they are copied out once."""
        block = tuple(index_B.tolist())
        if block not in self._columns:
            self._columns[block] = self.value_EnK[..., index_B]
        return self._columns[block]


class Gated(Objective):
    """A Hessian for each row, never formed: the mean over tokens of w x x^T, drawn to the plain one; and a lean.

    The cost is e H e^T + 2 l e^T with H = (1 - p) mean_t(w_t x_t x_t^T) + p (the plain one) + a ridge and
    l = (1 - p) mean_t(c_t x_t), both over the row's mean of w. p is PLAIN_SHARE, and more where tokens are few: the
    plain Hessian counts as K of them. weight_EnN and cross_EnN [E, n, N] are zero where the inputs are.
    """

    def __init__(self, inputs: Inputs, weight_EnN: Tensor, cross_EnN: Tensor, hessian_EKK: Tensor):
        input_EnK, tokens_E = inputs.value_EnK, inputs.tokens_E
        columns = input_EnK.shape[-1]
        share_E = (columns / (tokens_E + columns)).clamp(min=PLAIN_SHARE)
        mean_EN = (weight_EnN.sum(1) / tokens_E[:, None]).clamp(min=torch.finfo(torch.float32).tiny)
        factor_E1N = ((1 - share_E) / tokens_E)[:, None, None] / mean_EN[:, None]
        self._inputs, self._input_EnK = inputs, input_EnK
        self._weight_EnN = weight_EnN * factor_E1N
        self._lean_ENK = (cross_EnN * factor_E1N).mT @ input_EnK
        self._plain_EKK = share_E[:, None, None] * hessian_EKK
        trace_EN = (self._weight_EnN.mT @ input_EnK.square().sum(-1, keepdim=True))[..., 0]
        plain_E1 = self._plain_EKK.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True)
        self._ridge_EN = RIDGE / columns * (trace_EN + plain_E1)

    def cost(self, error_ENK: Tensor) -> Tensor:
        output_EnN = self._input_EnK @ error_ENK.mT
        cost_EN = (self._weight_EnN * output_EnN.square()).sum(1)
        return cost_EN + (error_ENK * (self._spread(error_ENK) + 2 * self._lean_ENK)).sum(-1)

    def order(self) -> Tensor:
        return torch.argsort(self._plain_EKK.diagonal(dim1=1, dim2=2).mean(0), descending=True, stable=True)

    def curvature(self, index_B: Tensor) -> Tensor:
        input_EnB = self._inputs.columns(index_B)
        weighted_EnNB = self._weight_EnN[..., None] * input_EnB[:, :, None]
        curve_ENBB = (weighted_EnNB.flatten(2).mT @ input_EnB).unflatten(1, (-1, len(index_B)))
        curve_ENBB += self._plain_EKK[:, None, index_B][..., index_B]
        curve_ENBB.diagonal(dim1=2, dim2=3).add_(self._ridge_EN[..., None])
        return curve_ENBB

    def pulls(self, error_ENK: Tensor) -> "GatedPulls":
        return GatedPulls(self, error_ENK)

    def system(self, codes_ENGS: Tensor, weight_ENK: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        groups, size = codes_ENGS.shape[2:]
        inputs = self._input_EnK.split(size, -1)
        outputs_ENGn = torch.stack([codes_ENGS[:, :, g] @ input_EnS.mT for g, input_EnS in enumerate(inputs)], 2)
        weighted_ENGn = outputs_ENGn * self._weight_EnN.mT[:, rows, None]
        system_ENGG = weighted_ENGn @ outputs_ENGn.mT
        wanted_ENG = (weighted_ENGn @ (weight_ENK @ self._input_EnK.mT)[..., None])[..., 0]
        rest_ENK = self._spread(weight_ENK, rows) + self._lean_ENK[:, rows]
        wanted_ENG += (rest_ENK.unflatten(-1, (groups, size)) * codes_ENGS).sum(-1)
        for group in range(groups):
            spread_ENK = codes_ENGS[:, :, group] @ self._plain_EKK[:, group * size : (group + 1) * size]
            system_ENGG[:, :, group] += (spread_ENK.unflatten(-1, (groups, size)) * codes_ENGS).sum(-1)
            system_ENGG[:, :, group, group] += self._ridge_EN[:, rows] * codes_ENGS[:, :, group].square().sum(-1)
        return system_ENGG, wanted_ENG

    def _spread(self, error_ENK: Tensor, rows: slice = slice(None)) -> Tensor:
        """Errors times all of H but what the tokens weigh."""
        return error_ENK @ self._plain_EKK + self._ridge_EN[:, rows, None] * error_ENK


class GatedPulls(Pulls):
    def __init__(self, objective: Gated, error_ENK: Tensor):
        self._of = objective
        self._output_EnN = objective._input_EnK @ error_ENK.mT
        self._rest_ENK = objective._spread(error_ENK) + objective._lean_ENK

    def read(self, index_B: Tensor) -> Tensor:
        pull_ENB = (self._of._weight_EnN * self._output_EnN).mT @ self._of._inputs.columns(index_B)
        return pull_ENB + self._rest_ENK[..., index_B]

    def move(self, index_B: Tensor, change_ENB: Tensor) -> None:
        self._output_EnN += self._of._inputs.columns(index_B) @ change_ENB.mT
        self._rest_ENK += change_ENB @ self._of._plain_EKK[:, index_B]
        self._rest_ENK[..., index_B] += self._of._ridge_EN[..., None] * change_ENB
