"""What every method offers: codes and parameters for a stack of layers of one shape, given what calibration measured.

    codes_ENK, parameters = method.round(weight_ENK, grid, hessian_EKK)

E layers, N output channels, K input channels, G groups of a row, H channels of what reads a layer's output. hessian_EKK
is the mean of x x^T over the inputs x a layer met in calibration, fp32; None for methods without calibration.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats.grid import Grid, Parameters


@dataclass(frozen=True)
class Rounded:
    """Layers of one shape: the weights they aim at, the Hessians they were rounded by, and what was chosen for them."""

    weight_ENK: Tensor
    hessian_EKK: Tensor
    codes_ENK: Tensor
    parameters: Parameters


@dataclass(frozen=True)
class FeedForward:
    """down(act(gate x + a) * (up x + b)) of an expert or a dense layer, and some x [n, K] it met in calibration."""

    input_nK: Tensor
    down_HN: Tensor
    biases: tuple[Tensor | None, Tensor | None]
    """a and b."""
    activation: Callable[[Tensor], Tensor]


class Method(ABC):
    """One way to choose codes. Subclasses are frozen dataclasses: their fields are the method's settings."""

    calibrated = True
    folds = False
    """Moves scales into the layer before, which changes tensors that are not quantised (`quant.methods.folds`)."""

    corrects = False
    """Aims at what the unquantised model puts out, not at what its own weights make of inexact inputs (`targets`)."""

    samples_inputs = False
    """Then `refine` is asked once more for gates with their up projections, and inputs they met (`gated`)."""

    def working_bytes(self, tokens: int, rows: int, columns: int) -> int:
        """Held for a time by `refine`, for gates of that shape and that many inputs."""
        return 0

    @abstractmethod
    def round(self, weight_ENK: Tensor, grid: Grid, hessian_EKK: Tensor | None) -> tuple[Tensor, Parameters]:
        """Codes int8 [E, N, K] and their parameters, for finite weights."""


def output_error(error_ENK: Tensor, hessian_EKK: Tensor) -> Tensor:
    """Mean squared error [E, N] of each output channel over the calibration inputs: e H e^T for its weights' error."""
    return ((error_ENK @ hessian_EKK) * error_ENK).sum(-1)


def importance(hessian_EKK: Tensor) -> Tensor:
    """How much an error in each input channel counts in the search of scales, [E, K]: its inputs' relative size.

    The root of the mean square: the square itself lets the search spoil channels whose inputs are small
    (docs/quantisation.md).
    """
    size_EK = hessian_EKK.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    mean_E1 = size_EK.mean(-1, keepdim=True)
    return torch.where(mean_E1 > 0, size_EK / mean_E1, 1.0).clamp(min=1e-3)


def per_column(values_ENG: Tensor, columns: int) -> Tensor:
    """Parameters of groups [..., G] repeated for every column [..., K], as fp32."""
    return values_ENG.float().repeat_interleave(columns // values_ENG.shape[-1], -1)


def layer_of(parameters: Parameters, at: int) -> Parameters:
    """The parameters of one layer of a stack."""
    return Parameters(parameters.scale_NG[at], None if parameters.zero_NG is None else parameters.zero_NG[at])
