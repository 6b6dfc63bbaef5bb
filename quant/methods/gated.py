"""GPTQ whose gate and up projections are then refined by what their errors do to the output of the whole part.

    method = GatedGptq();  codes_ENK, parameters = method.round(weight_ENK, grid, hessian_EKK)
    gate, up = method.refine(gate, up, grid, parts)                   # quant.methods.method.Rounded

A few rows at a time, gates and ups by turns, each given all others as they are now (`feed_forward`): errors of one row
make good those of another, which a layer-wise objective cannot see. E, N, K, G as in `method`, R rows of a chunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from quant.formats.grid import Grid, Parameters
from quant.methods.feed_forward import FeedForwards, state_bytes
from quant.methods.gptq import Gptq
from quant.methods.method import FeedForward, Rounded
from quant.methods.refinement import refine, take

ROUNDS = 2
BATCH_BYTES = 1 << 29
"""Of the states of experts that are refined side by side; one is refined whatever it takes."""


@dataclass(frozen=True)
class GatedGptq(Gptq):
    samples_inputs = True

    def working_bytes(self, tokens: int, rows: int, columns: int) -> int:
        return max(BATCH_BYTES, state_bytes(tokens, rows, columns))

    def refine(self, gate: Rounded, up: Rounded, grid: Grid, parts: Sequence[FeedForward]) -> tuple[Rounded, Rounded]:
        """Codes that `round` chose made better. On the sampled inputs no part's output is further off than before."""
        both = [_copy(gate), _copy(up)]
        for index_E in batches(parts):
            several = FeedForwards(
                [parts[e] for e in index_E.tolist()],
                wanted=[one.weight_ENK[index_E] for one in both],
                now=[grid.decode(*_chosen(one, index_E, slice(None))).float() for one in both],
            )
            chunks = list(several.chunks())
            for _, (which, one), rows in product(range(ROUNDS), enumerate(both), chunks):
                _refine_rows(several, which, rows, one, index_E, grid)
        return both[0], both[1]


def _refine_rows(several: FeedForwards, which: int, rows: slice, one: Rounded, index_E: Tensor, grid: Grid) -> None:
    """Scales and codes of some rows of some layers, written into `one`."""
    codes_ERK, parameters = _chosen(one, index_E, rows)
    objective = several.objective(which, rows, one.hessian_EKK[index_E])
    found_ERK, found = refine(one.weight_ENK[index_E, rows], codes_ERK, parameters, objective, grid, rounds=1)
    better_E = several.put(which, rows, grid.decode(found_ERK, found).float())
    one.codes_ENK[index_E[better_E], rows] = found_ERK[better_E]
    one.parameters.scale_NG[index_E[better_E], rows] = found.scale_NG[better_E]


def _chosen(one: Rounded, index_E: Tensor, rows: slice) -> tuple[Tensor, Parameters]:
    return one.codes_ENK[index_E, rows], take(one.parameters, index_E, rows)


def _copy(one: Rounded) -> Rounded:
    """With codes and scales that may be written to."""
    parameters = Parameters(one.parameters.scale_NG.clone(), one.parameters.zero_NG)
    return replace(one, codes_ENK=one.codes_ENK.clone(), parameters=parameters)


def batches(parts: Sequence[FeedForward]) -> Iterator[Tensor]:
    """Numbers of parts that met about as many tokens, as many together as BATCH_BYTES holds."""
    tokens = [len(part.input_nK) for part in parts]
    order = sorted(range(len(parts)), key=tokens.__getitem__, reverse=True)
    while order:
        largest = parts[order[0]]
        room = max(1, BATCH_BYTES // state_bytes(len(largest.input_nK), *largest.down_HN.shape[::-1]))
        yield torch.tensor(order[:room])
        order = order[room:]
