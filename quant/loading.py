"""Opens an exported folder as a transformers model that is ready to run.

    model = load("exports/scout-int4")          # weights unpacked to bf16, activations rounded as the scheme says
    model.generate(...)

T tokens, H hidden size, E experts.
"""

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import CompressedTensorsConfig, FineGrainedFP8Config, PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.quantizers.base import SequentialLlama4TextExperts

from herd.run.errors import DataError, first_line
from quant.architectures import model_class
from quant.formats.fp8_block import fake_quantise_groups
from quant.readers import GGUF
from quant.sources import read_config


def load(path: str | Path) -> PreTrainedModel:
    """The compressed model in a folder, in eval mode on the CPU; DataError when it is not one or cannot be read.

    Experts are dispatched sparsely: each sees only its own tokens, where transformers' own form runs all of them on
    all tokens.
    """
    model, _ = load_with_info(Path(path))
    return route_experts(model)


def load_with_info(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model as transformers' own loader reads it, and that loader's report (missing_keys, unexpected_keys, ...).

    Only two things are added to what `from_pretrained` gives: the weights are unpacked now instead of at the first
    forward, and activations are rounded where the libraries do not do it on a CPU (`keep_tokens_apart`,
    `round_inputs`).
    """
    config = read_config(folder)
    section = config.to_dict().get("quantization_config")
    if not section:
        raise DataError(f"{folder}: config.json has no quantization_config; load it with transformers")
    if section["quant_method"] == GGUF:
        from quant.gguf.reading import load_gguf

        return load_gguf(folder), {}
    try:
        # The libraries draw progress bars on stderr, and warn that `dequantize` is followed.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
            model, info = model_class(config).from_pretrained(
                folder,
                dtype=torch.bfloat16,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                **_settings(section),
            )
            _unpack(model, section)
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError) as error:
        raise DataError(f"{folder} cannot be loaded: {first_line(error)}") from error
    return model.eval().requires_grad_(False), info


def _settings(section: dict[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` must be told for a container, so that weights end up unpacked on the CPU everywhere."""
    if section["quant_method"] == "bitsandbytes":
        return {"device_map": {"": "cpu"}}
    if section["quant_method"] == "fp8":
        kept = section["modules_to_not_convert"]
        return {"quantization_config": FineGrainedFP8Config(dequantize=True, modules_to_not_convert=kept)}
    # compressed-tensors (0.20) expects packed zeros in another shape than it writes, unless it unpacks while loading.
    asymmetric = any(not group["weights"]["symmetric"] for group in section.get("config_groups", {}).values())
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)} if asymmetric else {}


def _unpack(model: PreTrainedModel, section: dict[str, Any]) -> None:
    """Turn the layers into plain bf16 ones, by the library of the container."""
    if section["quant_method"] == "compressed-tensors":
        if hasattr(model, "hf_quantizer"):  # else they were unpacked while they were loaded
            model.hf_quantizer.compressor.decompress_model(model)
        keep_tokens_apart(model)
    elif section["quant_method"] == "bitsandbytes":
        model.dequantize(dtype=torch.bfloat16)
    else:  # fine-grained fp8 is unpacked while it loads; on a GPU its activations are rounded
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name not in section["modules_to_not_convert"]:
                round_inputs(module, fake_quantise_groups)


def round_inputs(module: nn.Module, rounding: Callable[[Tensor], Tensor] | None) -> RemovableHandle | None:
    """Apply a rounding to what enters a module, in place, until the handle is removed; None leaves it as it is."""
    if rounding is None:
        return None
    return module.register_forward_pre_hook(lambda _, inputs: (rounding(inputs[0]), *inputs[1:]))


def keep_tokens_apart(model: PreTrainedModel) -> PreTrainedModel:
    """Give every token its own activation scale in layers that see a matrix of tokens [T, H], in place.

    compressed-tensors (0.20) takes the first two dimensions as batch and token; for a matrix, which is what Llama 4's
    MoE layers are given, it falls back to one scale for the whole matrix, so that a token's result depends on its
    neighbours. Adding a batch dimension on the way in restores the scheme the folder declares.
    """
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.input_activations is not None:
            module.register_forward_pre_hook(_add_batch)
            module.register_forward_hook(_drop_batch)
    return model


def route_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Run each expert of a quantised Llama 4 on the tokens routed to it only, in place; other models are unchanged."""
    for module in model.modules():
        if isinstance(module, Llama4TextMoe) and isinstance(module.experts, SequentialLlama4TextExperts):
            module.forward = MethodType(_routed_forward, module)
    return model


def _routed_forward(self: Llama4TextMoe, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' Llama4TextMoe.forward without the rows of zeros: (output [T, H], router logits [T, E])."""
    hidden_TH = hidden_states.reshape(-1, self.hidden_dim)
    scores_TE, logits_TE = self.router(hidden_TH)
    out_TH = self.shared_expert(hidden_TH)
    for expert, scores_T in zip(self.experts, scores_TE.unbind(1), strict=True):
        rows = scores_T.nonzero().squeeze(1)
        if len(rows):
            out_TH.index_add_(0, rows, expert(hidden_TH[rows] * scores_T[rows, None]))
    return out_TH, logits_TE


def _add_batch(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    module.lacked_batch = inputs[0].ndim == 2
    return (inputs[0][None] if module.lacked_batch else inputs[0], *inputs[1:])


def _drop_batch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output[0] if module.lacked_batch else output
