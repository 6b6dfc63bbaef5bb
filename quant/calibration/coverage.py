"""How many calibration tokens each expert met, and how many rows it takes until all met enough.

    counts_BX = count_routes(decoder, batches, activations);  needed = batches_needed(counts_BX, first=4, quota=256)
    report = coverage_report(facts_by_layer)           # calibration.json

B batches, X experts of all layers together.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant.architectures import EXPERT_BANK
from quant.calibration.activations import Activations
from quant.calibration.decoder import Decoder
from quant.calibration.moments import FEW, watching

MEASURED, BLENDED, NEAREST = "measured", "blended", "nearest"


@torch.no_grad()
def count_routes(decoder: Decoder, batches: Sequence[Tensor], activations: Activations) -> np.ndarray:
    """Tokens of each batch that each expert of the unquantised model meets, int64 [B, X]; one pass over the layers."""
    activations.write(0, (decoder.embed(tokens_BT) for tokens_BT in batches))
    columns: dict[str, list[int]] = {}
    for index in range(len(decoder)):
        with decoder.layer(index) as layer:
            prefix = f"{decoder.prefix}.{index}."
            inputs = [f"{prefix}{name}" for name, _ in layer.named_modules()]
            inputs = [name for name in inputs if EXPERT_BANK.match(name) and name.endswith(".gate_proj")]
            columns |= {name: [0] * len(batches) for name in inputs}
            activations.write(index + 1, _counted(decoder, index, layer, activations, columns, inputs))
            activations.drop(index)
    activations.drop(len(decoder))
    return np.array(list(columns.values()), dtype=np.int64).reshape(len(columns), len(batches)).T


def _counted(decoder, index, layer, activations, columns, inputs) -> Iterable[Tensor]:
    prefix = f"{decoder.prefix}.{index}."
    for number, hidden_BTH in enumerate(activations.read(index)):

        def watch(key: str, input_nK: Tensor, number: int = number) -> None:
            columns[key][number] += len(input_nK)

        with watching(layer, prefix, inputs, watch):
            yield decoder.run(index, layer, hidden_BTH)


def batches_needed(counts_BX: np.ndarray, *, first: int, quota: int) -> int:
    """The fewest batches, `first` at least, with which every expert meets `quota` tokens; all if none suffice."""
    total_BX = counts_BX.cumsum(0)
    enough_B = (total_BX >= quota).all(1)
    return max(first, int(enough_B.argmax()) + 1) if enough_B.any() else len(counts_BX)


def treatment(tokens: int, columns: int, *, expert: bool) -> str:
    """What became of a layer's Hessian: as measured, blended with that of its bank, or left out."""
    if tokens == 0:
        return NEAREST
    return BLENDED if expert and tokens < FEW * columns else MEASURED


def coverage_report(
    layers: Sequence[Mapping[str, Any]], *, rows: int, row_tokens: int, source: str, quota: int
) -> dict[str, Any]:
    """Every expert with its tokens, and the figures over all; layers: the facts each quantised layer left behind."""
    experts: dict[str, dict[str, Any]] = {}
    for facts in layers:
        for key, seen in facts["inputs"].items():
            found = EXPERT_BANK.match(key)
            if found and not key.endswith(".down_proj"):
                name = re.sub(r"\.(gate|up)_proj$", "", key)
                experts[name] = {"tokens": seen["tokens"], "treatment": seen["treatment"]}
    tokens = [expert["tokens"] for expert in experts.values()]
    summary = {
        "rows": rows,
        "row_tokens": row_tokens,
        "experts": len(experts),
        "experts_without_tokens": sum(count == 0 for count in tokens),
        "experts_below_quota": sum(count < quota for count in tokens),
        "least_tokens": min(tokens, default=0),
        "median_tokens": float(np.median(tokens)) if tokens else 0.0,
        "most_tokens": max(tokens, default=0),
    }
    return {"source": source, "expert_tokens_wanted": quota, "summary": summary, "experts": experts}
