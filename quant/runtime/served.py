"""What `quant.load` adds to a transformers model: it stays in bf16 on the CPU it was packed for, with a growing cache.

serve(model)      # in place: `generate`, calls and evaluation go on as before
"""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from herd.run.errors import ConfigError
from quant.runtime.caches import growing_cache


class Served:
    """Mixed into the model's own class by `serve`."""

    def _apply(self, fn: Any, recurse: bool = True) -> "Served":
        moved = fn(torch.empty(0, dtype=torch.bfloat16))
        if moved.dtype != torch.bfloat16 or moved.device.type != "cpu":
            raise ConfigError(
                f"a model served in low bits cannot become {moved.dtype} on {moved.device}: it is packed for this CPU; "
                "use quant.loading.load(folder), which unpacks to bf16"
            )
        return self

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        raise ConfigError(f"{save_directory}: a served model is packed for this CPU; copy the folder it came from")

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        plain = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if plain and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = growing_cache(self.config.get_text_config(decoder=True))
            return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


def serve(model: PreTrainedModel) -> PreTrainedModel:
    """Mix `Served` into the model's class, in place, and return the model in evaluation mode without gradients."""
    kind = type(model)
    model.__class__ = type(f"Served{kind.__name__}", (Served, kind), {"__doc__": f"{kind.__name__} in low bits."})
    return model.eval().requires_grad_(False)
