"""What a compression will write: each layer that is quantised, each tensor that is kept, and why.

plan = make_plan(source, Scheme.named("int4"), ignore=["*.mlp.down_proj"])     # or {"*.experts": "int4-g64", ...}
plan.headers()                     # name -> (dtype, shape) of every tensor of the export, in writing order
plan.parts["...up_proj.weight_scale"]     # (layer, "weight_scale")
plan.read_layer(source, layer)     # the finite [N, K] weight of one layer
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from herd.run.errors import ConfigError, DataError, NumericalError
from quant.allocations import Allocation, allocate
from quant.architectures import (
    EXPERT_BANK,
    SUPPORTED,
    architecture,
    build_skeleton,
    check_layout,
    has_experts,
    keep_pattern,
    kept_because,
    split_groups,
    tied_names,
)
from quant.formats.format import CHUNK_ELEMENTS, Header
from quant.readers import GGUF, check_reader
from quant.schemes import Scheme
from quant.sources import Source

USER = "asked for with --ignore"
ALLOCATED = "the allocation says so"
# What only a quantised layer has.
QUANTISED = (".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight.absmax")
# Stored with every layer, whatever its size: neither codes nor scales.
OVERHEAD = {"weight_shape", "weight.quant_map", "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4"}


@dataclass(frozen=True)
class Layer:
    """A linear layer: where its weight is in the source, its [N, K], and how it is stored."""

    name: str
    source: str
    shape: tuple[int, int]
    scheme: Scheme | None
    """None: in bf16."""
    expert: int | None = None


@dataclass(frozen=True)
class Plan:
    allocation: Allocation
    config: PretrainedConfig
    layers: tuple[Layer, ...]
    kept: dict[str, Header]
    """Tensors copied, floating ones as bf16."""
    ignored: dict[str, str]
    """Linear layers left alone, with the reason."""
    sliced: dict[str, Layer]
    """Kept tensors that are slices of fused experts in the source."""
    bytes_before: int
    order: tuple[str, ...] = field(repr=False)
    """Names of layers and kept tensors, in the order of the model."""

    def headers(self) -> dict[str, Header]:
        """dtype and shape of every tensor of the export, in writing order."""
        layers = {layer.name: layer for layer in self.layers}
        headers: dict[str, Header] = {}
        for name in self.order:
            if name in layers:
                stored = layers[name].scheme.stored(layers[name].shape)
                headers |= {f"{name}.{suffix}": header for suffix, header in stored.items()}
            else:
                headers[name] = self.kept[name]
        return headers

    @cached_property
    def parts(self) -> dict[str, tuple[Layer, str]]:
        """The layer and the suffix of every stored tensor of a quantised layer."""
        return {
            f"{layer.name}.{suffix}": (layer, suffix)
            for layer in self.layers
            for suffix in layer.scheme.stored(layer.shape)
        }

    @property
    def has_experts(self) -> bool:
        """Whether any layer chooses among experts."""
        return any(EXPERT_BANK.match(name) for name in (*self.ignored, *(layer.name for layer in self.layers)))

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors of the export."""
        return sum(header_bytes(header) for header in self.headers().values())

    @property
    def quantised_weights(self) -> int:
        return sum(prod(layer.shape) for layer in self.layers)

    @property
    def all_weights(self) -> int:
        return self.quantised_weights + sum(prod(shape) for _, shape in self.kept.values())

    @property
    def bits_per_quantised_weight(self) -> float:
        """Codes and scales (not the few bytes that repeat shapes and tables) per weight that is quantised."""
        stored = [layer.scheme.stored(layer.shape) for layer in self.layers]
        counted = [header for part in stored for suffix, header in part.items() if suffix not in OVERHEAD]
        return 8 * sum(map(header_bytes, counted)) / self.quantised_weights

    @property
    def bits_per_weight(self) -> float:
        """Over the whole model, kept tensors included."""
        return 8 * self.bytes_after / self.all_weights

    def read_layer(self, source: Source, layer: Layer) -> Tensor:
        """The finite weight [N, K] of a layer; NumericalError naming it when it holds NaN or Inf."""
        tensor = source.read(layer.source, expert=layer.expert)
        if layer.expert is not None:
            if layer.name.endswith(".gate_proj"):
                tensor = tensor[:, : tensor.shape[1] // 2]
            elif layer.name.endswith(".up_proj"):
                tensor = tensor[:, tensor.shape[1] // 2 :]
            tensor = tensor.T.contiguous()
        return finite(tensor, layer.name, source.place)

    def read_kept(self, source: Source, name: str) -> Tensor:
        """A copied tensor, floating ones as finite bf16."""
        if name in self.sliced:
            return self.read_layer(source, self.sliced[name]).to(torch.bfloat16)
        tensor = finite(source.read(name), name, source.place)
        return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def make_plan(source: Source, scheme: Scheme | Mapping[str, str], *, ignore: Sequence[str] = ()) -> Plan:
    """Decide every layer of the source. Patterns are globs over layer names, or regular expressions after `re:`.

    scheme: one for all, or the choices of `quant.allocations.allocate`.
    """
    fused = build_skeleton(source.config, fused=True)
    check_layout(fused)
    _check_tensors(source, fused)
    skeleton = build_skeleton(source.config)
    linears = {name: tuple(m.weight.shape) for name, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
    ignored = _ignored(linears, source.config, ignore)
    if isinstance(scheme, Scheme):
        allocation = Allocation.uniform(scheme)
    else:
        allocation, kept_by_choice = allocate(scheme, [name for name in linears if name not in ignored])
        ignored |= dict.fromkeys(kept_by_choice, ALLOCATED)
        ignored = {name: ignored[name] for name in linears if name in ignored}
    layers = tuple(
        _layer(name, shape, source, allocation.of(name)) for name, shape in linears.items() if name not in ignored
    )
    if not layers:
        raise ConfigError(f"{source.place}: no layer is left to quantise; drop an --ignore pattern")
    split = split_groups({layer.name for layer in layers}, set(ignored))
    if split:
        raise ConfigError(f"ignore = {list(ignore)} splits layers that servers merge ({split[0]}); ignore all of them")
    _check_shapes(layers)
    _check_readable(allocation, skeleton)
    kept, order = _kept(skeleton, source, {layer.name for layer in layers}, set(ignored))
    left = (_layer(name, linears[name], source, None) for name in ignored)
    sliced = {f"{layer.name}.weight": layer for layer in left if layer.expert is not None}
    read = {layer.source for layer in (*layers, *sliced.values())} | (kept.keys() - sliced.keys())
    before = sum(header_bytes(source.headers[name]) for name in read)
    return Plan(allocation, source.config, layers, kept, ignored, sliced, before, order)


def _check_shapes(layers: Sequence[Layer]) -> None:
    """Raise ConfigError when a layer cannot be stored; its mend fits all of them, or keeps all that do not fit."""
    faults = {layer: fault for layer in layers if (fault := layer.scheme.format.fault(layer.shape)) is not None}
    if not faults:
        return
    first = next(iter(faults))
    sizes = first.scheme.fitting([layer.shape for layer in layers if layer.scheme == first.scheme])
    if sizes:
        mend = f"use group_size {' or '.join(map(str, sizes))}"
    else:
        kept = list(dict.fromkeys(keep_pattern(layer.name) for layer in faults))
        left = any(not any(fnmatchcase(layer.name, pattern) for pattern in kept) for layer in layers)
        flags = " ".join(f"--ignore '{pattern}'" for pattern in kept)
        mend = "use fp8" + (f", or keep what does not fit in bf16: {flags} (or an allocation)" if left else "")
    raise ConfigError(f"{first.name}: shape {list(first.shape)}, {faults[first]}; {mend}")


def _check_readable(allocation: Allocation, skeleton: PreTrainedModel) -> None:
    """Raise ConfigError when the program that is to read the export cannot take this model."""
    if allocation.container == GGUF:
        from quant.gguf.metadata import metadata

        metadata(skeleton.config, kind=allocation.schemes[0].format.kind, name="")
        return
    for scheme in allocation.schemes:  # the gate reloads it
        check_reader(scheme.name, scheme.container, "transformers", moe=has_experts(skeleton))


def finite(tensor: Tensor, name: str, place: str) -> Tensor:
    """The tensor itself; NumericalError naming it when it holds NaN or Inf."""
    if tensor.is_floating_point():
        # In parts, because what is asked of each takes three times its memory.
        bad = sum(int((~part.isfinite()).sum()) for part in tensor.flatten().split(CHUNK_ELEMENTS))
        if bad:
            share = f"{bad} of {tensor.numel()} values are NaN or Inf"
            raise NumericalError(f"{name}: {share} in {place}; go back to a checkpoint without")
    return tensor


def header_bytes(header: Header) -> int:
    """Bytes a tensor takes on disk."""
    dtype, shape = header
    return prod(shape) * torch.empty(0, dtype=dtype).element_size()


def _check_tensors(source: Source, fused: nn.Module) -> None:
    for name in sorted(source.headers):
        if name.endswith(QUANTISED):
            layer = name.partition(".weight")[0]
            raise DataError(f"{source.place}: {layer} is already quantised ({name}); start from the unquantised model")
    expected = {name: tuple(tensor.shape) for name, tensor in fused.state_dict().items()}
    tied = tied_names(fused)
    for name in sorted(expected.keys() - source.headers.keys() - tied):
        raise DataError(f"{source.place}: tensor {name} is missing; {architecture(source.config)} has one, "
                        "with this config.json")  # fmt: skip
    for name in sorted(source.headers.keys() - expected.keys()):
        raise DataError(f"{source.place}: tensor {name} does not belong to {architecture(source.config)}; "
                        f"supported: {SUPPORTED}")  # fmt: skip
    for name, shape in expected.items():
        if name in source.headers and source.headers[name][1] != shape:
            raise DataError(f"{source.place}: {name} has shape {source.headers[name][1]}, config.json says {shape}")
        if name in source.headers and source.headers[name][0] is None:
            raise DataError(f"{source.place}: {name} is not stored in plain floating point; start from such a model")


def _ignored(linears: dict[str, tuple], config: PretrainedConfig, patterns: Sequence[str]) -> dict[str, str]:
    ignored = {name: reason for name in linears if (reason := kept_because(name, config))}
    for pattern in patterns:
        _check_pattern(pattern)
        matched = [name for name in linears if matches(pattern, name)]
        if not matched:
            raise ConfigError(f"ignore = {pattern!r} matches no linear layer; one of them is {next(iter(linears))!r}")
        ignored |= {name: USER for name in matched if name not in ignored}
    return {name: ignored[name] for name in linears if name in ignored}


def _check_pattern(pattern: str) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"ignore = {pattern!r}: not a regular expression ({error}); mend it") from None


def matches(pattern: str, name: str) -> bool:
    """A glob over the whole name, or a regular expression from its start after `re:`."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)


def _layer(name: str, shape: tuple[int, int], source: Source, scheme: Scheme | None) -> Layer:
    bank = EXPERT_BANK.match(name)
    if f"{name}.weight" in source.headers or not bank:
        return Layer(name, f"{name}.weight", shape, scheme)
    expert, part = name.removeprefix(bank["bank"] + ".").split(".")
    fused = "down_proj" if part == "down_proj" else "gate_up_proj"
    return Layer(name, f"{bank['bank']}.{fused}", shape, scheme, int(expert))


def _kept(
    skeleton: nn.Module, source: Source, quantised: set[str], ignored: set[str]
) -> tuple[dict[str, Header], tuple[str, ...]]:
    """Copied tensors with their headers, and the order of everything that is written."""
    tied = tied_names(skeleton)
    kept: dict[str, Header] = {}
    order: list[str] = []
    for name, tensor in skeleton.state_dict().items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in quantised:
            order.append(module)
        elif name not in tied:
            kept[name] = (torch.bfloat16 if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
            order.append(name)
    return kept, tuple(order)
