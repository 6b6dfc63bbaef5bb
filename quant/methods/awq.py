"""Activation-aware scaling (AWQ, Lin et al. 2023): input channels that carry more are stored more finely.

    factor_K = Awq().factors([(weight_ENK, hessian_EKK, tokens_E), ...], grid)
    codes_ENK, parameters = Awq().round(weight_ENK, grid, hessian_EKK)

A factor x^a for each input channel (x its root mean square, a the best in [0, 1]) multiplies the weights before they
are rounded and divides what makes their input (`folds`); powers of two, so nothing else changes. Shapes: `method`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats.grid import Grid, Parameters
from quant.methods.method import Method, importance, output_error

Consumer = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Awq(Method):
    folds = True
    candidates: int = 20
    """Values of a, besides 0."""

    def round(self, weight_ENK: Tensor, grid: Grid, hessian_EKK: Tensor | None) -> tuple[Tensor, Parameters]:
        parameters = grid.search(weight_ENK, importance(hessian_EKK))
        return grid.encode(weight_ENK, parameters), parameters

    def factors(self, consumers: Sequence[Consumer], grid: Grid) -> Tensor:
        """The factor of each channel [K], fp32, for layers that share their input.

        consumers: stacks of quantised weights [E, N, K], their Hessians [E, K, K], and the tokens [E] they were
        measured on, which weigh their errors.
        """
        tokens = sum(tokens_E.sum() for _, _, tokens_E in consumers)
        power_K = sum((h.diagonal(dim1=-2, dim2=-1) * t[:, None]).sum(0) for _, h, t in consumers)
        size_K = (power_K / tokens.clamp(min=1)).clamp(min=0).sqrt()
        size_K = size_K.clamp(min=float(size_K.max()) * 1e-6 + 1e-30)
        best_K, least = torch.ones_like(size_K), self.error(torch.ones_like(size_K), consumers, grid)
        tried = {tuple(best_K.tolist())}
        for step in range(1, self.candidates + 1):
            factor_K = power_of_two(size_K.pow(step / self.candidates))
            if tuple(factor_K.tolist()) in tried:
                continue
            tried.add(tuple(factor_K.tolist()))
            error = self.error(factor_K, consumers, grid)
            if error < least:
                best_K, least = factor_K, error
        return best_K

    def error(self, factor_K: Tensor, consumers: Sequence[Consumer], grid: Grid) -> float:
        """The summed output error over the calibration tokens when weights are rounded with a factor."""
        total = 0.0
        for weight_ENK, hessian_EKK, tokens_E in consumers:
            scaled_ENK = weight_ENK.float() * factor_K
            folded_EKK = fold_hessian(hessian_EKK, factor_K)
            codes_ENK, parameters = self.round(scaled_ENK, grid, folded_EKK)
            error_EN = output_error(scaled_ENK - grid.decode(codes_ENK, parameters).float(), folded_EKK)
            total += float((error_EN.double().sum(-1) * tokens_E).sum())
        return total


def fold_hessian(hessian_EKK: Tensor, factor_K: Tensor) -> Tensor:
    """The Hessian of inputs divided by a factor."""
    return hessian_EKK / (factor_K[:, None] * factor_K[None, :])


def power_of_two(factor_K: Tensor) -> Tensor:
    """Scaled so that the geometric middle of the smallest and the largest is 1, each rounded to a power of two."""
    log_K = factor_K.log2()
    return torch.exp2((log_K - (log_K.max() + log_K.min()) / 2).round())
