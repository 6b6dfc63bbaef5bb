"""The herd's members as plain facts: published dimensions, an inferred Behemoth, and nano forms of all three.

    config = SPECS["scout-nano"].config(vocab_size=8192)      # a transformers Llama4TextConfig

A nano form keeps its model's signature: where the experts are and how many, qk-norm, NoPE every 4th layer,
chunked attention with temperature tuning. Importing this needs neither torch nor transformers.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from herd.run.errors import ConfigError

if TYPE_CHECKING:
    from transformers import Llama4Config, Llama4TextConfig

_LISTED = 8


@dataclass(frozen=True)
class Spec:
    """One model of the herd."""

    name: str
    published: bool
    """True where Meta published these dimensions; False for an estimate and for the nano forms."""
    note: str
    """Where the dimensions come from, for plans and model cards."""
    text: Mapping[str, Any]
    """Fields of transformers' Llama4TextConfig."""
    vision: Mapping[str, Any] | None = None
    """Fields of transformers' Llama4VisionConfig, used for counting only."""

    def config(self, **overrides: Any) -> "Llama4TextConfig":
        """Return the text configuration with `overrides` applied.

        Raises ConfigError for an unknown field (naming the nearest), a wrong type, or sizes that do not fit together.
        """
        # transformers and torch take seconds to import; a spec's name and note must be readable without them.
        from huggingface_hub.errors import StrictDataclassError
        from transformers import Llama4TextConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        fields = list(Llama4TextConfig.__annotations__)
        for field in overrides:
            if field not in fields:
                raise ConfigError(_unknown(f"model {self.name}: overrides.{field}", field, fields))
        values = {**self.text, **overrides}
        _check_sizes(self.name, values)
        try:
            config = Llama4TextConfig(**values)
        except (StrictDataclassError, KeyError, ValueError) as error:
            cause = " ".join(str(error).split())
            raise ConfigError(f"model {self.name}: overrides = {overrides}: {cause}") from error
        known = sorted({"default", *ROPE_INIT_FUNCTIONS})
        if config.rope_parameters["rope_type"] not in known:  # transformers only warns, then fails with a KeyError
            raise ConfigError(_unknown(f"model {self.name}: rope_type", config.rope_parameters["rope_type"], known))
        return config

    def full_config(self) -> "Llama4Config | Llama4TextConfig":
        """Return the configuration including the vision tower, where the spec has one."""
        from transformers import Llama4Config

        if self.vision is None:
            return self.config()
        return Llama4Config(text_config=self.config().to_dict(), vision_config=dict(self.vision))


def find_spec(name: str) -> Spec:
    """Return the spec called `name`; ConfigError naming the nearest where there is none."""
    if name not in SPECS:
        raise ConfigError(_unknown("model source", name, list(SPECS)))
    return SPECS[name]


def _unknown(where: str, given: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
    if close:
        return f"{where}: no such name as {given!r}; did you mean {close[0]!r}?"
    listed = ", ".join(allowed[:_LISTED]) + (", ..." if len(allowed) > _LISTED else "")
    return f"{where}: no such name as {given!r}; known: {listed}"


def _check_sizes(name: str, values: Mapping[str, Any]) -> None:
    """Raise ConfigError where whole-number sizes are not positive or contradict each other."""
    for field in _SIZES:
        if type(values[field]) is not int or values[field] < 1:
            raise ConfigError(f"model {name}: {field} = {values[field]!r} must be a whole number above 0")
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % kv_heads:
        divisors = [d for d in range(1, heads + 1) if heads % d == 0]
        raise ConfigError(
            f"model {name}: num_key_value_heads = {kv_heads} must divide num_attention_heads = {heads}; use one of "
            f"{', '.join(map(str, divisors))}"
        )
    if values["head_dim"] % 2:
        raise ConfigError(f"model {name}: head_dim = {values['head_dim']} must be even; RoPE turns pairs")
    if values["num_experts_per_tok"] > values["num_local_experts"]:
        raise ConfigError(
            f"model {name}: num_experts_per_tok = {values['num_experts_per_tok']} exceeds num_local_experts = "
            f"{values['num_local_experts']}; lower it"
        )
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = values.get(field)
        if isinstance(token, int) and not 0 <= token < values["vocab_size"]:
            raise ConfigError(f"model {name}: {field} = {token} must lie in 0..{values['vocab_size'] - 1} (vocab_size)")


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_local_experts",
    "num_experts_per_tok",
    "interleave_moe_layer_step",
    "attention_chunk_size",
    "floor_scale",
)

_COMMON = {
    "num_experts_per_tok": 1,
    "no_rope_layer_interval": 4,
    "attn_temperature_tuning": True,
    "attn_scale": 0.1,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
_REAL = {
    **_COMMON,
    "vocab_size": 202048,
    "head_dim": 128,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "bos_token_id": 200000,
    "eos_token_id": 200001,
    "pad_token_id": 200018,
}
_REAL_17B = {
    **_REAL,
    "hidden_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
_SCOUT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
# Chunks of 128 because a paged KV cache may serve these models and its blocks (128 tokens on CPU) must divide a chunk;
# widths are multiples of 64 so that groups of 32 and 64 quantised weights fit everywhere.
_NANO = {
    **_COMMON,
    "vocab_size": 4096,
    "head_dim": 32,
    "attention_chunk_size": 128,
    "floor_scale": 128,
    "max_position_embeddings": 8192,
    "rope_parameters": _PLAIN_ROPE,
}
_VISION = MappingProxyType(
    {
        "hidden_size": 1408,
        "num_hidden_layers": 34,
        "num_attention_heads": 16,
        "intermediate_size": 5632,
        "image_size": 336,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "vision_output_dim": 4096,
    }
)

SPECS: Mapping[str, Spec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            Spec(
                name="scout",
                published=True,
                note="Llama 4 Scout 17B-16E: MoE in every layer, 16 experts, qk-norm",
                text=MappingProxyType(
                    {
                        **_REAL_17B,
                        "num_local_experts": 16,
                        "interleave_moe_layer_step": 1,
                        "use_qk_norm": True,
                        "max_position_embeddings": 10485760,
                        "rope_parameters": _SCOUT_ROPE,
                    }
                ),
                vision=_VISION,
            ),
            Spec(
                name="maverick",
                published=True,
                note="Llama 4 Maverick 17B-128E: MoE in every second layer, 128 experts, no qk-norm",
                text=MappingProxyType(
                    {
                        **_REAL_17B,
                        "num_local_experts": 128,
                        "interleave_moe_layer_step": 2,
                        "use_qk_norm": False,
                        "max_position_embeddings": 1048576,
                        "rope_parameters": _PLAIN_ROPE,
                    }
                ),
                vision=_VISION,
            ),
            Spec(
                name="behemoth",
                published=False,
                note="INFERRED: a scaled-up Scout that meets what is published of Behemoth "
                "(288B active, 16 experts, nearly 2T total); Meta never published its dimensions",
                text=MappingProxyType(
                    {
                        **_REAL,
                        "hidden_size": 16384,
                        "num_hidden_layers": 88,
                        "num_attention_heads": 128,
                        "num_key_value_heads": 16,
                        "intermediate_size": 26112,
                        "intermediate_size_mlp": 52224,
                        "num_local_experts": 16,
                        "interleave_moe_layer_step": 1,
                        "use_qk_norm": True,
                        "max_position_embeddings": 262144,
                        "rope_parameters": _PLAIN_ROPE,
                    }
                ),
            ),
            Spec(
                name="scout-nano",
                published=False,
                note="Scout's signature for a laptop: MoE in every layer, 16 experts, qk-norm",
                text=MappingProxyType(
                    {
                        **_NANO,
                        "hidden_size": 128,
                        "num_hidden_layers": 4,
                        "num_attention_heads": 4,
                        "num_key_value_heads": 2,
                        "intermediate_size": 128,
                        "intermediate_size_mlp": 256,
                        "num_local_experts": 16,
                        "interleave_moe_layer_step": 1,
                        "use_qk_norm": True,
                    }
                ),
            ),
            Spec(
                name="maverick-nano",
                published=False,
                note="Maverick's signature for a laptop: MoE in every second layer, 128 experts, no qk-norm",
                text=MappingProxyType(
                    {
                        **_NANO,
                        "hidden_size": 128,
                        "num_hidden_layers": 4,
                        "num_attention_heads": 4,
                        "num_key_value_heads": 2,
                        "intermediate_size": 64,
                        "intermediate_size_mlp": 256,
                        "num_local_experts": 128,
                        "interleave_moe_layer_step": 2,
                        "use_qk_norm": False,
                    }
                ),
            ),
            Spec(
                name="behemoth-nano",
                published=False,
                note="the inferred Behemoth's signature for a laptop: MoE in every layer, 16 experts, qk-norm",
                text=MappingProxyType(
                    {
                        **_NANO,
                        "hidden_size": 256,
                        "num_hidden_layers": 4,
                        "num_attention_heads": 8,
                        "num_key_value_heads": 4,
                        "intermediate_size": 256,
                        "intermediate_size_mlp": 512,
                        "num_local_experts": 16,
                        "interleave_moe_layer_step": 1,
                        "use_qk_norm": True,
                    }
                ),
            ),
        )
    }
)
