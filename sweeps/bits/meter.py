"""KL from the bf16 model to the model under an allocation, on fixed rows, by forward passes alone.

meter = Meter(problem, rows)
meter.measure(allocation).mean                # nats a token; .kl_N and .tokens_N are its rows

N rows, B micro-batch, T tokens, V vocabulary.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evals.rows import Rows
from evals.scores import score_rows
from quant.allocations import BF16
from sweeps.bits.mixed_model import MixedModel
from sweeps.bits.problem import Allocation, Problem


@dataclass(frozen=True)
class Divergence:
    """Sums over each row's scored tokens."""

    kl_N: NDArray[np.float64]
    tokens_N: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Nats a token."""
        return float(self.kl_N.sum() / self.tokens_N.sum())


class Meter:
    """Holds one model and the bf16 model's logits on the rows: rows x T x V numbers of two bytes."""

    def __init__(self, problem: Problem, rows: Rows, *, micro_rows: int = 4, model: MixedModel | None = None) -> None:
        self.model = MixedModel(problem) if model is None else model
        self._rows, self._micro_rows = rows, micro_rows
        self.model.set(problem.uniform(BF16))
        self._reference = Recorded(self.model, rows, micro_rows)

    def measure(self, allocation: Allocation) -> Divergence:
        """KL(bf16 || allocation) of every row; exactly 0 when every group stays bf16."""
        self.model.set(allocation)
        scores = score_rows(self.model, self._rows, reference=self._reference, micro_rows=self._micro_rows)
        return Divergence(scores.divergence.kl_N, scores.tokens_N)


class Recorded(nn.Module):
    """A model's logits on micro-batches of rows, given again whenever such a batch comes."""

    @torch.inference_mode()
    def __init__(self, model: MixedModel, rows: Rows, micro_rows: int) -> None:
        super().__init__()
        self.config = model.config
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # where scores look for the device
        self._logits: dict[bytes, Tensor] = {
            _key(batch.input_ids_BT): model(input_ids=batch.input_ids_BT, use_cache=False).logits
            for batch in rows.micro_batches(micro_rows)
        }

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self._logits[_key(input_ids)])


def _key(input_ids_BT: Tensor) -> bytes:
    return input_ids_BT.numpy().tobytes()
