"""Where a factor for each channel can move from a layer's input into what makes that input. Rules as data.

    for fold in find_folds(names):                      # names of a decoder layer's modules
        fold.producer, fold.consumers                   # producer's output / factor, consumers' input columns x factor

The function of the unquantised layer stays the same as long as all that read the producer are multiplied: the router of
a mixture of experts too, which is why factors behind a norm are shared by its router and all its experts. Factors are
powers of two, with which bf16 weights are divided and multiplied exactly.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from herd.run.errors import ConfigError


@dataclass(frozen=True)
class Fold:
    producer: str
    """A norm, or the projection whose output enters the consumers channel by channel."""
    consumers: tuple[str, ...]


# Names behind each norm, within a decoder layer.
_BEHIND = {
    "input_layernorm": r"self_attn\.(q|k|v)_proj",
    "post_attention_layernorm": r"mlp\.(gate|up)_proj"
    r"|feed_forward\.(router|((shared_expert|experts\.\d+)\.)?(gate|up)_proj)",
}
# Architectures whose decoder layers are wired as these names say, with norms that multiply by their weight.
WIRED = (
    "Llama4ForCausalLM", "Llama4ForConditionalGeneration", "LlamaForCausalLM", "MistralForCausalLM",
    "Qwen2ForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip


def check_wired(architecture: str) -> None:
    """Raise ConfigError for an architecture whose wiring is not known."""
    if architecture not in WIRED:
        raise ConfigError(f"method = awq: knows the wiring of {', '.join(WIRED)}, not of {architecture}; use gptq")


def find_folds(names: Iterable[str], quantised: Iterable[str]) -> list[Fold]:
    """The folds of a decoder layer that reach a quantised layer; names are relative to the layer."""
    names, quantised = list(names), set(quantised)
    folds = [
        Fold(norm, tuple(name for name in names if re.fullmatch(pattern, name)))
        for norm, pattern in _BEHIND.items()
        if norm in names
    ]
    folds += [
        Fold(f"{parent}.up_proj", (name,))
        for name in names
        if name.endswith(".down_proj") and f"{(parent := name.rpartition('.')[0])}.up_proj" in names
    ]
    return [fold for fold in folds if quantised.intersection(fold.consumers)]
