"""The largest weight and the largest input of every layer, shared among layers that servers merge.

book = RangeBook(plan, source, input_absmax={"model.layers.0.mlp.up_proj": 12.5, ...})
book.of(layer)                     # Ranges, as the layer's format needs them

`input_absmax` is what a calibration measured: layer name -> largest magnitude that entered the layer.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from herd.run.errors import ConfigError, DataError
from quant.architectures import input_tie, weight_tie
from quant.formats.format import Ranges
from quant.sources import Source

if TYPE_CHECKING:
    from quant.plans import Layer, Plan


class RangeBook:
    """Weights are read when first asked for; ConfigError for a scheme that needs inputs that were not measured."""

    def __init__(
        self,
        plan: "Plan",
        source: Source,
        input_absmax: Mapping[str, float] | Callable[[], Mapping[str, float]] | None = None,
    ):
        """input_absmax: the ranges, or what measures them when the first is asked for."""
        self._plan = plan
        self._source = source
        self._weights: dict[str, float] = {}
        self._measured = input_absmax
        asking = [scheme.name for scheme in plan.allocation.schemes if scheme.format.needs_input_range]
        if asking and input_absmax is None:
            name = asking[0]
            raise ConfigError(f"scheme = {name}: input ranges are not calibrated; use fp8, which rounds at run time")
        if not callable(input_absmax):
            self._inputs  # noqa: B018 (faults of given ranges are told at once)
        self._tied: dict[str, list[Layer]] = {}
        for layer in plan.layers:
            self._tied.setdefault(weight_tie(layer.name), []).append(layer)

    def of(self, layer: "Layer") -> Ranges:
        """The ranges of a layer, taken over all layers it shares a scale with."""
        weight = self._weight(weight_tie(layer.name)) if layer.scheme.format.needs_weight_range else None
        return Ranges(weight, self._inputs.get(input_tie(layer.name)))

    def _weight(self, tie: str) -> float:
        if tie not in self._weights:
            weights = (self._plan.read_layer(self._source, layer) for layer in self._tied[tie])
            self._weights[tie] = max(weight.abs().max().item() for weight in weights)
        return self._weights[tie]

    @cached_property
    def _inputs(self) -> dict[str, float]:
        if not any(scheme.format.needs_input_range for scheme in self._plan.allocation.schemes):
            return {}
        measured = self._measured() if callable(self._measured) else self._measured
        largest: dict[str, float] = {}
        for layer in self._plan.layers:
            tie = input_tie(layer.name)
            largest[tie] = max(largest.get(tie, 0.0), measured.get(layer.name, 0.0))
        for layer in self._plan.layers:
            if not 0 < largest[input_tie(layer.name)] < float("inf"):
                found = largest[input_tie(layer.name)]
                raise DataError(f"{layer.name}: calibrated input range is {found:g}; give rows that reach this layer")
        return largest
