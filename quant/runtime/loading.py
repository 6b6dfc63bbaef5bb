"""Opens an exported folder for serving: low-bit kernels on a CPU, transformers' own path on other devices.

    model = load("exports/scout-int4")         # a transformers model; never holds the bf16 weights of packed layers
    model.generate(...)

`quant.loading.load` is the reference path: the same model unpacked to bf16, as transformers computes it.
"""

import contextlib
import io
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4TextMLP, Llama4TextModel, Llama4TextMoe

from herd.run import bf16_products
from herd.run.devices import check_device
from herd.run.errors import ConfigError, DataError, first_line
from quant import loading as reference
from quant.architectures import model_class
from quant.file_checks import UNSEALED, check_files
from quant.memory import give_back
from quant.readers import BITSANDBYTES
from quant.runtime.crossovers import Crossovers
from quant.runtime.decoding import use_lean_steps
from quant.runtime.feed_forward import Mlp, route
from quant.runtime.served import serve
from quant.runtime.stored_layers import StoredLayers, kinds_of
from quant.sources import read_config
from quant.tensor_files import TensorFiles
from quant.units import derive_buffers


def load(path: str | Path, *, device: str = "cpu", kernel_rows: int | None = None) -> PreTrainedModel:
    """The compressed model in a folder, in eval mode; DataError when it is not one or cannot be read.

    Files that are no longer those its gate.json was written for are refused (1.7 GB are read a second to know).

    On a CPU the weights stay as small as they are stored (int4, int8 and fp8 of compressed-tensors, bitsandbytes' nf4);
    experts see only their own tokens. kernel_rows: inputs of at most that many rows use the kernel for few rows; None
    measures.
    Other devices and other schemes get transformers' own path, and one line on stderr says so.
    """
    if kernel_rows is not None and kernel_rows < 0:
        raise ConfigError(f"kernel_rows = {kernel_rows}: must be 0 or more, or None to measure")
    folder = Path(path)
    files = check_files(folder)
    if files is None:
        _say(f"{folder}: {UNSEALED}")
    elif not files.passed:
        raise DataError(f"{folder}: {files.detail}")
    config = read_config(folder)
    section = config.to_dict().get("quantization_config")
    if not section:
        raise DataError(f"{folder}: config.json has no quantization_config; load it with transformers")
    if check_device(device, said=f"device = {device!r}").type != "cpu":
        _say(f"{folder}: on {device} transformers unpacks the weights to bf16; vLLM serves the folder with GPU kernels")
        return reference.load(folder).to(device)
    bf16_products.install()
    if section["quant_method"] == BITSANDBYTES:
        return serve(reference.route_experts(_load_bitsandbytes(folder, config)))
    kinds = kinds_of(section)
    if kinds is None:
        _say(f"{folder}: no CPU kernel for {_describe(section)}; weights are unpacked to bf16")
        return reference.load(folder)
    return _serve(folder, config, StoredLayers(TensorFiles(folder), kinds, Crossovers(kernel_rows)))


def _load_bitsandbytes(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    """transformers' own model of bitsandbytes' layers, whose CPU kernel multiplies packed weights."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            model, info = model_class(config).from_pretrained(
                folder, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True, trust_remote_code=False
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"{folder} cannot be loaded: {first_line(error)}") from error
    if info["missing_keys"]:
        raise DataError(f"{folder}: tensor {min(info['missing_keys'])} is missing; copy the folder again")
    return model


def _serve(folder: Path, config: PretrainedConfig, layers: StoredLayers) -> PreTrainedModel:
    with torch.device("meta"):
        model = model_class(config)._from_config(config, dtype=torch.bfloat16)
    _replace_layers(model, layers)
    derive_buffers(model, model)
    _fill(model, folder, layers)
    for module in list(model.modules()):
        if isinstance(module, Llama4TextModel):
            use_lean_steps(module)
    give_back()
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = model.generation_config.from_pretrained(folder)
    return serve(model)


def _fill(model: PreTrainedModel, folder: Path, layers: StoredLayers) -> None:
    """Read what is not quantised into the model; DataError for a tensor too many, too few, or of another shape."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = {}
    for name in layers.files:
        if name in layers.used:
            continue
        tensor = layers.files[name]
        if name not in shapes:
            raise DataError(f"{folder}: tensor {name} belongs to no layer of the model; export it again")
        if tensor.shape != shapes[name]:
            raise DataError(f"{folder}: tensor {name} is {list(tensor.shape)}, expected {list(shapes[name])}")
        state[name] = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
    missing, _ = model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights(set(missing), recompute_mapping=False)  # a head that is stored apart stays what it is
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    missing = sorted(name for name, tensor in tensors.items() if tensor.is_meta)
    if missing:
        raise DataError(f"{folder}: tensor {missing[0]} is missing; copy the folder again")


def _replace_layers(model: PreTrainedModel, layers: StoredLayers) -> None:
    """Put layers for serving in the places of quantised ones, from the first to the last; each is read just then."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Llama4TextMoe):
            shared = _mlp(f"{name}.shared_expert", module.shared_expert.activation_fn, layers)
            experts = [
                _mlp(f"{name}.experts.{expert}", module.experts.act_fn, layers) for expert in range(module.num_experts)
            ]
            route(module, experts=experts, shared=shared)
            give_back()
        elif isinstance(module, Llama4TextMLP) and not name.endswith(".shared_expert"):
            model.set_submodule(name, _mlp(name, module.activation_fn, layers))
        elif isinstance(module, nn.Linear) and layers.quantised(name):
            if isinstance(model.get_submodule(name.rpartition(".")[0]), Mlp):
                continue
            layer = layers.make([name])
            layer.bias = module.bias
            model.set_submodule(name, layer)


def _mlp(name: str, activation: nn.Module, layers: StoredLayers) -> Mlp:
    gate_up = layers.make([f"{name}.gate_proj", f"{name}.up_proj"])
    return Mlp(gate_up, layers.make([f"{name}.down_proj"]), activation)


def _describe(section: dict) -> str:
    return f"{section.get('quant_method', 'unknown')} {section.get('format', '')}".strip()


def _say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)
