"""The key-value part of a GGUF file: what llama.cpp must know of a model, and where it would compute another one.

values = metadata(config, kind="Q4_0", name="scout-int4")      # key -> int, float, bool, str or list
factors = rope_factors(config)                                 # of Llama 3's long-context scaling, fp32
"""

from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from herd.run.errors import ConfigError
from quant.gguf.layout import gguf_architecture

FILE_TYPES = {"Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
# What llama.cpp writes into its program instead of reading it from the file (src/models/llama4.cpp).
CHUNK, FLOOR_SCALE, ATTENTION_SCALE, ROPE_INTERVAL, EXPERTS_WITHOUT_NORM = 8192, 8192, 0.1, 4, 128


def metadata(config: PretrainedConfig, *, kind: str, name: str) -> dict[str, Any]:
    """Every key but the tokenizer's; ConfigError for a model that llama.cpp would compute otherwise."""
    arch = gguf_architecture(config)
    prefix = gguf.MODEL_ARCH_NAMES[arch]
    llama4 = arch == gguf.MODEL_ARCH.LLAMA4
    if llama4:
        _check_llama4(config)
    _check_common(config)
    values: dict[str, Any] = {
        "general.architecture": prefix,
        "general.name": name,
        "general.file_type": int(FILE_TYPES[kind]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        f"{prefix}.vocab_size": config.vocab_size,
        f"{prefix}.context_length": context_length(config),
        f"{prefix}.block_count": config.num_hidden_layers,
        f"{prefix}.embedding_length": config.hidden_size,
        f"{prefix}.feed_forward_length": config.intermediate_size_mlp if llama4 else config.intermediate_size,
        f"{prefix}.attention.head_count": config.num_attention_heads,
        f"{prefix}.attention.head_count_kv": config.num_key_value_heads,
        f"{prefix}.attention.key_length": config.head_dim,
        f"{prefix}.attention.value_length": config.head_dim,
        f"{prefix}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{prefix}.rope.dimension_count": config.head_dim,
        f"{prefix}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if llama4:
        values |= {
            f"{prefix}.expert_count": config.num_local_experts,
            f"{prefix}.expert_used_count": config.num_experts_per_tok,
            f"{prefix}.expert_feed_forward_length": config.intermediate_size,
            f"{prefix}.interleave_moe_layer_step": config.interleave_moe_layer_step,
        }
    return values


def context_length(config: PretrainedConfig) -> int:
    """Positions up to which llama.cpp computes this very model.

    For a Llama 4 it takes chunks of 8192 and scales the attention of layers without rotary embedding from position
    8191 on; a model with other numbers is the same one until the smaller of each pair.
    """
    limits = [config.max_position_embeddings]
    if gguf_architecture(config) == gguf.MODEL_ARCH.LLAMA4:
        if config.attention_chunk_size != CHUNK:
            limits += [config.attention_chunk_size, CHUNK]
        tuning = (bool(config.attn_temperature_tuning), config.floor_scale, config.attn_scale)
        if tuning != (True, FLOOR_SCALE, ATTENTION_SCALE):
            limits += [FLOOR_SCALE - 1, *([int(config.floor_scale) - 1] if tuning[0] else [])]
    return min(limits)


def rope_factors(config: PretrainedConfig) -> Tensor:
    """What llama.cpp divides each plain rotary frequency by, fp32 [head_dim / 2], from transformers' own table."""
    rope = config.rope_parameters
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return (1.0 / rope["rope_theta"] ** exponent) / scaled.float()


def _check_common(config: PretrainedConfig) -> None:
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise ConfigError(f"rope_type = {kind}: not written to GGUF here; default and llama3 are")
    if config.hidden_act != "silu":
        raise ConfigError(f"hidden_act = {config.hidden_act}: llama.cpp computes silu for this architecture")


def _check_llama4(config: PretrainedConfig) -> None:
    layers = range(1, config.num_hidden_layers + 1)
    fixed = {
        "no_rope_layers": (
            [int(bool(layer % ROPE_INTERVAL)) for layer in layers],
            [int(x) for x in config.no_rope_layers],
        ),
        "use_qk_norm": (config.num_local_experts != EXPERTS_WITHOUT_NORM, bool(config.use_qk_norm)),
        "moe_layers": (
            [layer - 1 for layer in layers if layer % config.interleave_moe_layer_step == 0],
            list(config.moe_layers),
        ),
        "attention_bias": (False, bool(config.attention_bias)),
    }
    for field, (computed, configured) in fixed.items():
        if computed != configured:
            raise ConfigError(f"{field} = {configured}: llama.cpp computes {computed} for a Llama 4 of this size")
