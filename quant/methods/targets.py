"""Weights to aim at, given that a layer's inputs are no longer those of the unquantised model (after GPTAQ, Li 2025).

target_ENK = corrected(weight_ENK, hessian_EKK, shift_EKK)

With x the input here and y the same token's in the unquantised model, |W y - V x|^2 is least for V = W (I + C H^-1), C
the mean of (y - x) x^T and H that of x x^T. E, N, K as in `method`.
"""

import torch
from torch import Tensor

from quant.methods.gptq import damped

SHARE = 0.75
DAMPING = 0.05


def corrected(weight_ENK: Tensor, hessian_EKK: Tensor, shift_EKK: Tensor) -> Tensor:
    """W (I + share C (H + damping)^-1): all of the correction would fit the noise of few tokens too."""
    factor_EKK = torch.linalg.solve(damped(hessian_EKK, DAMPING), shift_EKK.mT)
    return weight_ENK + SHARE * (weight_ENK @ factor_EKK.mT)
