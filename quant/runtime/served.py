"""What `quant.load` adds to a transformers model: it stays as it was packed for this CPU, and its cache grows in place.

serve(model)      # in place; class, `generate`, calls and evaluation stay as they were
"""

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from herd.run.errors import ConfigError
from quant.runtime.caches import growing_cache


def serve(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model in evaluation mode, without gradients, its methods of moving and saving replaced."""
    for method in (_apply, save_pretrained, _prepare_cache_for_generation):
        setattr(model, method.__name__, MethodType(method, model))
    return model.eval().requires_grad_(False)


def _apply(self: PreTrainedModel, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreTrainedModel:
    """Every cast and move of a module ends here; only those that change nothing are let through."""
    moved = fn(torch.empty(0, dtype=torch.bfloat16))
    if moved.dtype != torch.bfloat16 or moved.device.type != "cpu":
        raise ConfigError(
            f"a model served in low bits cannot become {moved.dtype} on {moved.device}: it is packed for this CPU; "
            "use quant.loading.load(folder), which unpacks to bf16"
        )
    return self


def save_pretrained(self: PreTrainedModel, save_directory: str | Path, **kwargs: Any) -> None:
    """Refused: what would be saved, only this CPU could read."""
    raise ConfigError(f"{save_directory}: a served model is packed for this CPU; copy the folder it came from")


def _prepare_cache_for_generation(
    self: PreTrainedModel,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    """As transformers', but its usual cache is the growing one."""
    usual = generation_config.use_cache is not False and generation_config.cache_implementation is None
    if usual and model_kwargs.get("past_key_values") is None:
        model_kwargs["past_key_values"] = growing_cache(self.config.get_text_config(decoder=True))
    else:
        type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
