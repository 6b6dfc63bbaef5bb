"""Gated feed-forward parts whose gate and up projections are chosen one after another: what their outputs miss by now.

    several = FeedForwards(parts, wanted=[gate_ENK, up_ENK], now=[gate_ENK, up_ENK])
    for rows in several.chunks(): objective = several.objective(0, rows, hessian_EKK); several.put(0, rows, value_ERK)

E parts, n tokens, N rows, R of a chunk, K input channels, H output channels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from quant.methods.method import FeedForward
from quant.methods.objectives import Gated, Inputs
from quant.methods.refinement import BLOCK

MOST_BOUND = 1.6
MOST_ROWS = 64
TINY = torch.finfo(torch.float32).tiny


class FeedForwards:
    """The cost is the squared distance of down(act(gate x) (up x)) from what the wanted weights make of the inputs.

    That is sum_t d M d^T, d what the hidden channels miss, M = down^T down. An error e of a row makes its d s (e x), s
    the slope of act(gate) up. Rows of a chunk move at once but meet one another in M: M_RR is replaced by a diagonal
    that is no smaller, its own times the largest eigenvalue of M_RR scaled to a diagonal of ones.
    """

    def __init__(self, parts: Sequence[FeedForward], wanted: Sequence[Tensor], now: Sequence[Tensor]):
        self._activation = parts[0].activation
        self._tokens_E = torch.tensor([float(len(part.input_nK)) for part in parts])
        self._input_EnK = pad_sequence([part.input_nK.float() for part in parts], batch_first=True)
        self._inputs = Inputs(self._input_EnK, self._tokens_E)
        self._met_En1 = torch.arange(self._input_EnK.shape[1])[:, None] < self._tokens_E[:, None, None]
        down_EHN = torch.stack([part.down_HN.float() for part in parts])
        self._metric_ENN = down_EHN.mT @ down_EHN
        self._size_EN = self._metric_ENN.diagonal(dim1=1, dim2=2).clamp(min=TINY).sqrt()
        self._bias_E1N = [_stacked([part.biases[which] for part in parts], now[which]) for which in (0, 1)]
        self._wanted_EnN = [self._outputs(which, slice(None), wanted[which]) for which in (0, 1)]
        self._now_EnN = [self._outputs(which, slice(None), now[which]) for which in (0, 1)]
        self._exact_EnN = self._activation(self._wanted_EnN[0]) * self._wanted_EnN[1]
        self._missing_EnN = self._exact_EnN - self._activation(self._now_EnN[0]) * self._now_EnN[1]

    def cost(self) -> Tensor:
        """The squared distance [E] over all tokens."""
        return ((self._missing_EnN @ self._metric_ENN) * self._missing_EnN).sum((1, 2))

    def chunks(self) -> Iterator[slice]:
        """Rows that move at one time: as many as have a majoriser that is not far above what it stands for."""
        rows = self._metric_ENN.shape[-1]
        step = 1
        while 2 * step <= min(rows, MOST_ROWS) and self._mean_bound(2 * step) <= MOST_BOUND:
            step *= 2
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def objective(self, which: int, rows: slice, hessian_EKK: Tensor) -> Gated:
        """What errors of these rows of the gate (0) or up projection (1) cost, all others as they are."""
        slope_EnR = self._slopes(which, rows)
        own_E1R = (self._bounds(rows)[:, None] * self._size_EN[:, rows].square())[:, None]
        error_EnR = self._wanted_EnN[which][..., rows] - self._now_EnN[which][..., rows]
        pull_EnR = self._missing_EnN @ self._metric_ENN[:, rows].mT
        cross_EnR = slope_EnR * (pull_EnR - own_E1R * slope_EnR * error_EnR)
        return Gated(self._inputs, own_E1R * slope_EnR.square(), cross_EnR, hessian_EKK)

    def put(self, which: int, rows: slice, value_ERK: Tensor) -> Tensor:
        """Take over weights for these rows, in the parts [E] whose outputs miss by no more with them."""
        output_EnR = self._outputs(which, rows, value_ERK)
        gate_EnR, up_EnR = (output_EnR if which == one else self._now_EnN[one][..., rows] for one in (0, 1))
        missing_EnR = self._exact_EnN[..., rows] - self._activation(gate_EnR) * up_EnR
        change_EnR = missing_EnR - self._missing_EnN[..., rows]
        pull_EnR = 2 * self._missing_EnN @ self._metric_ENN[:, rows].mT
        pull_EnR += change_EnR @ self._metric_ENN[:, rows, rows]
        better_E = (pull_EnR * change_EnR).sum((1, 2)) <= 0
        self._missing_EnN[better_E, :, rows] = missing_EnR[better_E]
        self._now_EnN[which][better_E, :, rows] = output_EnR[better_E]
        return better_E

    def _outputs(self, which: int, rows: slice, weight_ERK: Tensor) -> Tensor:
        return self._input_EnK @ weight_ERK.mT + self._bias_E1N[which][..., rows]

    def _slopes(self, which: int, rows: slice) -> Tensor:
        """By how much an error of a row's output is multiplied behind the activation [E, n, R]; 0 where no token is."""
        gate_EnR = self._now_EnN[0][..., rows]
        if which == 1:
            return self._activation(gate_EnR) * self._met_En1
        with torch.enable_grad():
            gate_EnR = gate_EnR.detach().requires_grad_()
            (slope_EnR,) = torch.autograd.grad(self._activation(gate_EnR).sum(), gate_EnR)
        return slope_EnR * self._now_EnN[1][..., rows] * self._met_En1

    def _bounds(self, rows: slice) -> Tensor:
        """Of each part [E], how far its rows' majoriser is above their own metric."""
        size_ER = self._size_EN[:, rows]
        scaled_ERR = self._metric_ENN[:, rows, rows] / (size_ER[:, None] * size_ER[..., None])
        return torch.linalg.eigvalsh(scaled_ERR)[:, -1].clamp(min=1.0)

    def _mean_bound(self, step: int) -> float:
        rows = self._metric_ENN.shape[-1]
        bounds = [self._bounds(slice(start, start + step)) for start in range(0, rows - step + 1, step)]
        return float(torch.stack(bounds).mean())


def state_bytes(tokens: int, rows: int, columns: int) -> int:
    """Held for one part, generously: inputs twice, eight numbers a token and row, a block of weighted inputs."""
    return 4 * (tokens * (2 * columns + 8 * rows + MOST_ROWS * BLOCK) + 2 * rows * rows)


def _stacked(biases: Sequence[Tensor | None], weight_ENK: Tensor) -> Tensor:
    """Biases [E, 1, N] of layers that may have none."""
    zero_N = weight_ENK.new_zeros(weight_ENK.shape[1])
    return torch.stack([zero_N if bias_N is None else bias_N.float() for bias_N in biases])[:, None]
