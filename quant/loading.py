"""Opens an exported folder as a transformers model that is ready to run.

    model = load("exports/scout-int4")          # weights unpacked to bf16, activations rounded as the scheme says
    model.generate(...)

T tokens, H hidden size, E experts.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from compressed_tensors.compressors import decompress_module
from compressed_tensors.quantization.utils import is_module_quantized
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import CompressedTensorsConfig, FineGrainedFP8Config, PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.quantizers.base import SequentialLlama4TextExperts

from herd.run import bf16_products
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
    container = Container(section)
    bf16_products.install()
    with reading(folder):
        model, info = container.from_pretrained(model_class(config), folder, output_loading_info=True)
        container.prepare(model)
        container.unpack(model)
    return model.eval().requires_grad_(False), info


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """DataError under the folder's name for what libraries find wrong with its content; their other words unsaid."""
    try:
        # They draw progress bars on stderr, and warn that `dequantize` is followed.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{folder} cannot be loaded: {first_line(error)}") from error


class Container:
    """How the library of a container reads it: by its `quantization_config`."""

    def __init__(self, section: dict[str, Any]):
        self._section = section
        self._method = section["quant_method"]

    def from_pretrained(self, kind: type[PreTrainedModel], folder: Path, **more: Any) -> Any:
        """transformers' own loader, told what it takes for weights to end up unpacked on the CPU everywhere."""
        return kind.from_pretrained(
            folder, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False, **self._settings(), **more
        )

    def prepare(self, model: PreTrainedModel) -> None:
        """Add the rounding of activations that the libraries do not do on a CPU (`keep_tokens_apart`), in place."""
        if self._method == "compressed-tensors":
            if hasattr(model, "hf_quantizer"):
                model.hf_quantizer.compressor.remove_decompression_hook(model)  # `unpack` comes before a forward
            keep_tokens_apart(model)
        elif self._method == "fp8":  # unpacked while it loads; on a GPU its activations are rounded
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name not in self._section["modules_to_not_convert"]:
                    round_inputs(module, fake_quantise_groups)

    def unpack(self, model: PreTrainedModel, part: nn.Module | None = None) -> None:
        """Turn the layers of a part (all of the model) that has its weights into plain bf16 ones, in place."""
        if self._method == "compressed-tensors" and hasattr(model, "hf_quantizer"):  # else done while loading
            compressor = model.hf_quantizer.compressor
            if part is None:
                compressor.decompress_model(model)
            for module in part.modules() if part is not None else ():  # the same, less what it does for accelerate
                if is_module_quantized(module):
                    decompress_module(module, compressor.force_compression_format)
        elif self._method == "bitsandbytes" and part is None:
            model.dequantize(dtype=torch.bfloat16)
        elif self._method == "bitsandbytes" and any(type(module).__name__ == "Linear4bit" for module in part.modules()):
            settings = model.hf_quantizer.quantization_config
            # Here because it imports bitsandbytes, which prints that it found no kernels to download.
            from transformers.integrations import dequantize_and_replace

            dequantize_and_replace(part, quantization_config=settings, dtype=torch.bfloat16)

    def _settings(self) -> dict[str, Any]:
        if self._method == "bitsandbytes":
            return {"device_map": {"": "cpu"}}
        if self._method == "fp8":
            kept = self._section["modules_to_not_convert"]
            return {"quantization_config": FineGrainedFP8Config(dequantize=True, modules_to_not_convert=kept)}
        # compressed-tensors (0.20) expects packed zeros in another shape than it writes, unless it unpacks on loading.
        groups = self._section.get("config_groups", {}).values()
        asymmetric = any(not group["weights"]["symmetric"] for group in groups)
        return {"quantization_config": CompressedTensorsConfig(dequantize=True)} if asymmetric else {}


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
