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

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from quant import fp8
from quant.architectures import model_class, split_experts
from quant.plans import Layer, Plan, make_plan, tied_names
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

    def __init__(self, plan: Plan, source: FolderSource):
        self._plan = plan
        self._source = source
        self._headers = plan.headers()
        self._layers = {layer.name: layer for layer in plan.layers}
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def __getitem__(self, name: str) -> Tensor:
        module, _, suffix = name.rpartition(".")
        if module not in self._layers or suffix not in self._plan.scheme.stored((0, 0)):
            return self._plan.read_kept(self._source, name)
        if self._last[0] != module:
            self._last = (module, compress_layer(self._plan, self._source, self._layers[module]))
        return self._last[1][suffix]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


def quantize(
    model: PreTrainedModel | str | Path, *, scheme: str, group_size: int = 64, ignore: Sequence[str] = ()
) -> QuantizedModel:
    """Quantise a transformers causal LM, in memory or from a Hugging Face folder; the original is left untouched.

    scheme is `int4` or `fp8`; group_size counts for int4; ignore holds globs (or `re:` expressions) over layer names.
    ConfigError for a scheme that does not fit a layer, DataError for a quantised or broken source, NumericalError for
    NaN or Inf, each naming the tensor.
    """
    source = open_source(model)
    plan = make_plan(source, Scheme.named(scheme, group_size), ignore=ignore)
    if isinstance(source, FolderSource):
        return QuantizedModel(plan, FolderTensors(plan, source), source.generation, Path(model))
    return QuantizedModel(plan, dict(compress(plan, source)), source.generation)


def compress(plan: Plan, source: Source) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the export, in writing order."""
    layers = {layer.name: layer for layer in plan.layers}
    for name in plan.order:
        if name in layers:
            tensors = compress_layer(plan, source, layers[name])
            yield from ((f"{name}.{suffix}", tensor) for suffix, tensor in tensors.items())
        else:
            yield name, plan.read_kept(source, name)


def compress_layer(plan: Plan, source: Source, layer: Layer) -> dict[str, Tensor]:
    """The stored tensors of one layer, by suffix."""
    return plan.scheme.compress(plan.read_layer(source, layer))


def fake_quantised(plan: Plan, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A bf16 model that holds the values of the stored tensors; fp8 layers round their input per token."""
    with no_init_weights():
        model = model_class(plan.config)._from_config(plan.config, dtype=torch.bfloat16)
    with torch.device("meta"):
        split_experts(model)
    state = {name: tensors[name] for name in plan.kept}
    suffixes = plan.scheme.stored((0, 0))
    for layer in plan.layers:
        stored = {suffix: tensors[f"{layer.name}.{suffix}"] for suffix in suffixes}
        state[f"{layer.name}.weight"] = plan.scheme.decompress(stored)
    missing, unexpected = model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    assert not unexpected and set(missing) <= tied_names(model), (missing, unexpected)
    if plan.scheme.name == "fp8":
        for layer in plan.layers:
            model.get_submodule(layer.name).register_forward_pre_hook(_round_input)
    return model.eval().requires_grad_(False)


def _round_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (fp8.fake_quantise_tokens(inputs[0]), *inputs[1:])
