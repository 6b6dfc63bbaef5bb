"""A quantised model in memory: what will be stored, and a model that computes what the stored one computes.

quantized = quantize(model, scheme="int4", group_size=64)
quantized.tensors["model.layers.0.mlp.up_proj.weight_packed"]
quantized.model(input_ids=...).logits
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from herd.run.errors import ConfigError
from quant.architectures import architecture, assemble
from quant.calibration.ranges import measure_ranges
from quant.calibration.settings import Calibration
from quant.calibration.tensors import CalibratedTensors
from quant.loading import round_inputs
from quant.methods.choice import make_method
from quant.methods.folds import check_wired
from quant.methods.method import Method, layer_of
from quant.methods.names import GRID_SCHEMES, METHODS, check_method, check_mixed
from quant.methods.rtn import Rtn
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
    method: str = "rtn"
    coverage: Callable[[], dict[str, Any]] | None = None
    """What a calibrated method saw of every expert (`quant.calibration.coverage`)."""
    scratch_bytes: int = 0
    """Disk that a calibrated method needs beside the export until it is done."""

    @cached_property
    def model(self) -> PreTrainedModel:
        """A bf16 transformers model with the quantised values, activations rounded as the scheme says; eval mode."""
        return fake_quantised(self.plan, self.tensors)


class UncalibratedTensors(Mapping[str, Tensor]):
    """The tensors of an export made on demand, one layer in memory at a time, without calibration."""

    def __init__(self, plan: Plan, source: Source, ranges: RangeBook, method: Method):
        self._plan = plan
        self._source = source
        self._ranges = ranges
        self._method = method
        self._headers = plan.headers()
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._plan.parts:
            return self._plan.read_kept(self._source, name)
        layer, suffix = self._plan.parts[name]
        if self._last[0] != layer.name:
            self._last = (layer.name, compress_layer(self._plan, self._source, self._ranges, self._method, layer))
        return self._last[1][suffix]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


def quantize(
    model: PreTrainedModel | str | Path,
    *,
    scheme: str | None = None,
    allocation: Mapping[str, str] | None = None,
    group_size: int | str = 64,
    container: str | None = None,
    ignore: Sequence[str] = (),
    input_absmax: Mapping[str, float] | None = None,
    method: str = "rtn",
    calibration: Calibration | None = None,
) -> QuantizedModel:
    """Quantise a transformers causal LM, in memory or from a Hugging Face folder; the original is left untouched.

    scheme, group_size and container as in `quant.readers`; or, in their place, allocation: group of layers (or glob
    over groups) -> `int4-g64`, `fp8`, ..., `bf16`, as in `quant.allocations`. ignore holds globs (or `re:` expressions)
    over layer names; method as in `quant.methods.names`, with a calibration where it needs one; fp8-static takes its
    input ranges from the calibration too, or from input_absmax (`quant.ranges`).
    ConfigError for a scheme that does not fit a layer, DataError for a quantised or broken source, NumericalError for
    NaN or Inf, each naming the tensor.
    """
    if isinstance(ignore, str) or not isinstance(allocation, Mapping | None):
        raise ConfigError("quantize: ignore is a list of patterns, allocation a mapping from groups to schemes")
    source = open_source(model)
    if (scheme is None) == (allocation is None):
        raise ConfigError("quantize: give either a scheme for all layers or an allocation")
    chosen = Scheme.named(scheme, group_size, container) if allocation is None else allocation
    plan = plan_method(source, chosen, method, ignore=ignore)
    if calibration is not None:
        check_context(plan, calibration)
    folder = Path(model) if isinstance(source, FolderSource) else None
    if METHODS[method].calibrated:
        if calibration is None:
            raise ConfigError(f"method = {method}: needs calibration rows; give `calibration`, or use rtn or hqq")
        made = CalibratedTensors(plan, source, make_method(method), calibration)
        tensors = made if folder else _held(plan, made)
        scratch_bytes = made.scratch_bytes if calibration.work else 0
        return QuantizedModel(plan, tensors, source.generation, folder, method, made.coverage, scratch_bytes)
    if input_absmax is None and calibration is not None:
        input_absmax = partial(measure_ranges, plan, source, calibration)
    ranges = RangeBook(plan, source, input_absmax)
    tensors = UncalibratedTensors(plan, source, ranges, make_method(method))
    return QuantizedModel(plan, tensors if folder else _held(plan, tensors), source.generation, folder, method)


def check_context(plan: Plan, calibration: Calibration) -> None:
    """Raise ConfigError when a calibration row has more tokens than the model has positions."""
    row_tokens = calibration.rows.tokens_NT.shape[1]
    most = getattr(plan.config.get_text_config(), "max_position_embeddings", None) or row_tokens
    if row_tokens > most:
        raise ConfigError(f"calibration rows of {row_tokens} tokens: the model has {most} positions; give --row-tokens "
                          f"{most} or fewer")  # fmt: skip


def _held(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of them now; kept ones as copies, since those of a bf16 model are the model's own."""
    return {name: tensor.clone() if name in plan.kept else tensor for name, tensor in tensors.items()}


def plan_method(source: Source, chosen: Scheme | Mapping[str, str], method: str, *, ignore: Sequence[str] = ()) -> Plan:
    """The plan of a method for a scheme or an allocation's choices, from shapes alone; ConfigError for a misfit."""
    plan = make_plan(source, chosen, ignore=ignore)
    if isinstance(chosen, Scheme):
        check_method(method, chosen.name)
    else:
        check_mixed(method, [each.name for each in plan.allocation.schemes])
    if method == "awq":
        check_wired(architecture(plan.config))
    return plan


def compress_layer(plan: Plan, source: Source, ranges: RangeBook, method: Method, layer: Layer) -> dict[str, Tensor]:
    """The stored tensors of one layer, by suffix, without calibration."""
    weight_NK = plan.read_layer(source, layer)
    if isinstance(method, Rtn) or layer.scheme.name not in GRID_SCHEMES:
        return layer.scheme.compress(weight_NK, ranges.of(layer))
    codes_1NK, parameters = method.round(weight_NK[None], layer.scheme.grid, None)
    return layer.scheme.store(codes_1NK[0], layer_of(parameters, 0))


def fake_quantised(plan: Plan, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A bf16 model that holds the values of the stored tensors; layers round their input as the format says."""
    state = {name: tensors[name] for name in plan.kept}
    roundings = {}
    for layer in plan.layers:
        state[f"{layer.name}.weight"], roundings[layer.name] = values_of(tensors, layer)
    model = assemble(plan.config, state)
    for name, rounding in roundings.items():
        round_inputs(model.get_submodule(name), rounding)
    return model.eval().requires_grad_(False)


def values_of(tensors: Mapping[str, Tensor], layer: Layer) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """The bf16 weight [N, K] that a layer's stored tensors stand for, and how it rounds its input, if it does."""
    stored = {suffix: tensors[f"{layer.name}.{suffix}"] for suffix in layer.scheme.stored(layer.shape)}
    return layer.scheme.decompress(stored), layer.scheme.format.input_rounding(stored)
