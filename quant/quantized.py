"""A quantised model in memory: what will be stored, and a model that computes what the stored one computes.

quantized = quantize(model, scheme="int4", group_size=64)
quantized.tensors["model.layers.0.mlp.up_proj.weight_packed"]
quantized.model(input_ids=...).logits
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from quant.architectures import assemble
from quant.loading import round_inputs
from quant.plans import Layer, Plan, make_plan
from quant.ranges import RangeBook
from quant.schemes import Scheme
from quant.sources import FolderSource, Source, open_source


@dataclass(frozen=True)
class QuantizedModel:
    """The result of `quantize`; `quant.export` writes it."""

    plan: Plan
    tensors: Mapping[str, Tensor]
    """Every tensor of the export by name. From a folder they are made when they are asked for."""
    generation: Mapping[str, Any]
    """Content of generation_config.json."""
    folder: Path | None = None
    """The source folder, when there is one."""

    @cached_property
    def model(self) -> PreTrainedModel:
        """A bf16 transformers model with the quantised values, activations rounded as the scheme says; eval mode."""
        return fake_quantised(self.plan, self.tensors)


class FolderTensors(Mapping[str, Tensor]):
    """The tensors of an export made on demand from a source folder, one layer in memory at a time."""

    def __init__(self, plan: Plan, source: FolderSource, ranges: RangeBook):
        self._plan = plan
        self._source = source
        self._ranges = ranges
        self._headers = plan.headers()
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._plan.parts:
            return self._plan.read_kept(self._source, name)
        layer, suffix = self._plan.parts[name]
        if self._last[0] != layer.name:
            self._last = (layer.name, compress_layer(self._plan, self._source, self._ranges, layer))
        return self._last[1][suffix]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


def quantize(
    model: PreTrainedModel | str | Path,
    *,
    scheme: str,
    group_size: int | str = 64,
    container: str | None = None,
    ignore: Sequence[str] = (),
    input_absmax: Mapping[str, float] | None = None,
) -> QuantizedModel:
    """Quantise a transformers causal LM, in memory or from a Hugging Face folder; the original is left untouched.

    scheme, group_size and container as in `quant.readers`; ignore holds globs (or `re:` expressions) over layer names;
    input_absmax, which fp8-static alone needs, the largest input each layer met in calibration (`quant.ranges`).
    ConfigError for a scheme that does not fit a layer, DataError for a quantised or broken source, NumericalError for
    NaN or Inf, each naming the tensor.
    """
    source = open_source(model)
    plan = make_plan(source, Scheme.named(scheme, group_size, container), ignore=ignore)
    ranges = RangeBook(plan, source, input_absmax)
    if isinstance(source, FolderSource):
        return QuantizedModel(plan, FolderTensors(plan, source, ranges), source.generation, Path(model))
    return QuantizedModel(plan, dict(compress(plan, source, ranges)), source.generation)


def compress(plan: Plan, source: Source, ranges: RangeBook) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the export, in writing order."""
    layers = {layer.name: layer for layer in plan.layers}
    for name in plan.order:
        if name in layers:
            tensors = compress_layer(plan, source, ranges, layers[name])
            yield from ((f"{name}.{suffix}", tensor) for suffix, tensor in tensors.items())
        else:
            yield name, plan.read_kept(source, name)


def compress_layer(plan: Plan, source: Source, ranges: RangeBook, layer: Layer) -> dict[str, Tensor]:
    """The stored tensors of one layer, by suffix."""
    return plan.scheme.compress(plan.read_layer(source, layer), ranges.of(layer))


def fake_quantised(plan: Plan, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A bf16 model that holds the values of the stored tensors; layers round their input as the format says."""
    state = {name: tensors[name] for name in plan.kept}
    roundings = {}
    for layer in plan.layers:
        stored = {suffix: tensors[f"{layer.name}.{suffix}"] for suffix in plan.scheme.stored(layer.shape)}
        state[f"{layer.name}.weight"] = plan.scheme.decompress(stored)
        roundings[layer.name] = plan.scheme.format.input_rounding(stored)
    model = assemble(plan.config, state)
    for name, rounding in roundings.items():
        round_inputs(model.get_submodule(name), rounding)
    return model.eval().requires_grad_(False)
