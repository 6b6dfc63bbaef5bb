"""The largest input of every layer over calibration rows, of the unquantised model, one decoder layer in memory.

input_absmax = measure_ranges(plan, source, calibration)        # for `quant.ranges`; layer name -> largest magnitude
"""

import torch
from torch import Tensor

from quant.calibration.activations import Activations
from quant.calibration.decoder import Decoder
from quant.calibration.moments import watching
from quant.calibration.settings import Calibration
from quant.calibration.stages import input_key
from quant.plans import Plan
from quant.sources import Source


@torch.no_grad()
def measure_ranges(plan: Plan, source: Source, calibration: Calibration) -> dict[str, float]:
    """Layers that no row reached are left out. All rows that may be drawn are read; hidden states stay in memory."""
    decoder = Decoder(plan, source)
    batches = calibration.rows.batches()
    states = Activations(None, "ranges", [])
    states.write(0, map(decoder.embed, batches))
    largest: dict[str, float] = {}

    def watch(key: str, input_nK: Tensor) -> None:
        largest[key] = max(largest.get(key, 0.0), input_nK.abs().max().item())

    for index in range(len(decoder)):
        prefix = f"{decoder.prefix}.{index}."
        names = [layer.name for layer in plan.layers if layer.name.startswith(prefix)]
        with decoder.layer(index) as layer, watching(layer, prefix, names, watch):
            states.write(index + 1, (decoder.run(index, layer, hidden_BTH) for hidden_BTH in states.read(index)))
        states.drop(index)
    found = {layer.name: largest.get(input_key(layer.name)) for layer in plan.layers}
    return {name: value for name, value in found.items() if value is not None}
