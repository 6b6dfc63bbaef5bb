"""How many rows a layer's few-row kernel is worth: measured at load, once for each shape and grouping.

    crossovers = Crossovers();  crossovers.set(layer)          # a few milliseconds for a shape not met before

Both ways compute the same to within bf16 rounding, so a noisy measurement costs time, not correctness.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from quant.runtime.int4 import Int4
from quant.runtime.int8 import Int8, round_tokens
from quant.runtime.linears import Linear

ROW_COUNTS = (1, 4, 16, 32, 64, 128)
SAMPLED_ROWS = 512  # output channels measured: cost grows in proportion to them
TRIALS = 3


class Crossovers:
    """Largest number of rows for the few-row kernel, by shape; lives as long as one load."""

    def __init__(self, fixed: int | None = None):
        self._fixed = fixed
        self.found: dict[tuple[str, int, int, int], int] = {}
        """(kind, N, K, group size) -> rows."""

    def set(self, layer: Linear) -> None:
        """Fill in `kernel_rows` of an int4 or int8 layer; others, and int8 of an odd width, have one way only."""
        if not isinstance(layer, Int4 | Int8) or (isinstance(layer, Int8) and not layer.has_kernel):
            return
        group = layer.group_size if isinstance(layer, Int4) else 0
        key = (type(layer).__name__.lower(), layer.out_features, layer.in_features, group)
        if key not in self.found:
            self.found[key] = measure(layer) if self._fixed is None else self._fixed
        layer.kernel_rows = self.found[key]


def measure(layer: Int4 | Int8) -> int:
    """The largest of ROW_COUNTS up to which the few-row kernel is no slower; 0 when it never is."""
    few, many = _ways(layer)
    best = 0
    with torch.inference_mode():
        for count in ROW_COUNTS:
            input_MK = torch.ones(count, layer.in_features, dtype=torch.bfloat16)
            if _seconds(few, input_MK) > _seconds(many, input_MK):
                return best
            best = count
    return best


def _ways(layer: Int4 | Int8) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    if isinstance(layer, Int8):
        sample = Int8(layer.codes[:SAMPLED_ROWS], layer.scale[:SAMPLED_ROWS])
        return lambda x: sample.through_kernel(*round_tokens(x)), lambda x: sample.through_integers(*round_tokens(x))
    sample = layer
    if layer.block is not None and layer.out_features > SAMPLED_ROWS:
        scale_zero_GN2 = layer.scale_zero[:, :SAMPLED_ROWS].contiguous()
        sample = Int4(layer.packed[:SAMPLED_ROWS], scale_zero_GN2, layer.in_features, layer.block)
    return sample.through_kernel, sample.through_kernel if sample.block is None else sample.through_tiles


def _seconds(way: Callable[[Tensor], Tensor], input_MK: Tensor) -> float:
    """The least of a few trials: other programs only add to it. The first compiles and is not counted."""
    way(input_MK)
    trials = []
    for _ in range(TRIALS):
        start = time.perf_counter()
        way(input_MK)
        trials.append(time.perf_counter() - start)
    return min(trials)
