"""Quantised models that are run unit by unit, so that a check of them needs the memory of one decoder layer.

    running = stream_reference(plan, tensors)        # what the export must compute
    running, info = stream_folder(folder)            # what it computes; info as transformers' loader reports it
    logits_BTV = running.logits(input_BT);  running.finish()

`stream_folder` is transformers' own `from_pretrained`, but that its one step that reads weights is taken once a unit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from quant.architectures import build_skeleton, model_class, tied_names
from quant.loading import Container, reading, round_inputs
from quant.plans import Plan
from quant.probes import Probe, probe_tokens
from quant.quantized import values_of
from quant.readers import GGUF
from quant.sources import read_config
from quant.tensor_files import TensorFiles
from quant.units import StreamedModel, Unit, derive_buffers, find_units, unit_of


def stream_reference(plan: Plan, tensors: Mapping[str, Tensor]) -> StreamedModel:
    """The model that `quant.quantized.fake_quantised` makes, its units made from the stored tensors one by one."""
    layers = {f"{layer.name}.weight": layer for layer in plan.layers}

    def fill(unit: Unit) -> None:
        for name in unit.state():
            if name in layers:
                weight_NK, rounding = values_of(tensors, layers[name])
                unit.place(name, weight_NK)
                round_inputs(skeleton.get_submodule(layers[name].name), rounding)
            elif name in plan.kept:
                unit.place(name, tensors[name])

    skeleton = _prepare(build_skeleton(plan.config))
    return StreamedModel(skeleton, fill)


def stream_probe(plan: Plan, tensors: Mapping[str, Tensor], stored: dict[str, str]) -> Probe:
    """What `quant.probes.take_probe` takes, of the streamed model."""
    running = stream_reference(plan, tensors)
    input_BT = probe_tokens(plan.config)
    logits_BTV = running.logits(input_BT)
    running.finish()
    return Probe(input_BT, logits_BTV.clone(), stored, running.digests)


def stream_folder(folder: Path) -> tuple[StreamedModel, dict[str, set]]:
    """An exported folder; DataError when it cannot be read. The report is whole once every unit has been entered."""
    config = read_config(folder)
    section = config.to_dict()["quantization_config"]
    if section["quant_method"] == GGUF:
        return _stream_gguf(folder, config), {}
    container = Container(section)
    with reading(folder):
        model, load_config = _open(model_class(config), folder, container)
    files = TensorFiles(folder)
    units = find_units(model)
    stored: dict[str, list[str]] = {name: [] for name in units}
    tied = tied_names(model)
    info: dict[str, set] = {"missing_keys": set(model.state_dict()) - tied}
    for name in files:
        owner = unit_of(name, units)
        if owner is None:
            info.setdefault("unexpected_keys", set()).add(name)
        else:
            stored[owner.name].append(name)

    def fill(unit: Unit) -> None:
        wanted = unit.state().keys()
        with reading(folder):
            state = {name: files[name] for name in stored[unit.name]}
            found, _ = convert_and_load_state_dict_in_model(model, state, load_config)
            if found.conversion_errors:
                raise ValueError(next(iter(found.conversion_errors.values())))
            for name in (wanted & found.missing_keys) - tied:  # transformers draws such at random, to go on
                unit.place(name, torch.zeros_like(unit.state()[name], device="cpu"))
            container.unpack(model, unit.module)
        info["missing_keys"] -= wanted - found.missing_keys
        for kind, keys in found.to_dict().items():
            if kind != "missing_keys":
                info[kind] = info.get(kind, set()) | set(keys)

    return StreamedModel(model, fill), info


def _stream_gguf(folder: Path, config: PretrainedConfig) -> StreamedModel:
    from quant.gguf.reading import GgufValues

    values = GgufValues(folder)
    skeleton = _prepare(build_skeleton(config))

    def fill(unit: Unit) -> None:
        for name, tensor in values.of(unit.state()).items():
            unit.place(name, tensor)

    return StreamedModel(skeleton, fill)


def _prepare(skeleton: PreTrainedModel) -> PreTrainedModel:
    derive_buffers(skeleton, skeleton)
    return skeleton.eval().requires_grad_(False)


def _open(
    kind: type[PreTrainedModel], folder: Path, container: Container
) -> tuple[PreTrainedModel, LoadStateDictConfig]:
    """What `from_pretrained` has before and after it reads weights: modules as the container's library has them."""
    seen: list[LoadStateDictConfig] = []

    def skip(model: PreTrainedModel, state: Any, files: Any, load_config: LoadStateDictConfig, *_: Any) -> tuple:
        seen.append(load_config)
        for tensor in model.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True  # so that nothing is drawn at random for it
        return LoadStateDictInfo(set(), set(), set(), [], {}, set()), None

    unread = type(kind.__name__, (kind,), {"_load_pretrained_model": staticmethod(skip), "__module__": kind.__module__})
    model = container.from_pretrained(unread, folder)
    container.prepare(model)
    return model.eval().requires_grad_(False), seen[0]
