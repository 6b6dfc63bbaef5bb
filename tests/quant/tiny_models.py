"""Tiny models with random weights, as transformers builds them.

model = BUILDERS["scout"]()
"""

from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)


def build_llama4(*, moe_every: int, **changes: Any) -> Llama4ForCausalLM:
    """Scout-like (every layer MoE) or Maverick-like (every second layer), 4 experts, 4 layers, bf16."""
    torch.manual_seed(moe_every)
    settings = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 128,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": moe_every,
        "max_position_embeddings": 256, "attention_chunk_size": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = Llama4TextConfig(**settings | changes)
    return _randomised(Llama4ForCausalLM(config))


def build_llama(*, tied: bool = False, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(3)
    settings = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": tied,
    }  # fmt: skip
    config = LlamaConfig(**settings | changes)
    return _randomised(LlamaForCausalLM(config))


def build_multimodal() -> PreTrainedModel:
    """A Llama 4 with a vision tower, as Scout and Maverick are published."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 32}
    vision |= {"projector_input_dim": 32, "projector_output_dim": 32}
    text = build_llama4(moe_every=2).config.to_dict()
    model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model.eval()


def build_gemma3() -> PreTrainedModel:
    """Two kinds of attention, a scaled embedding, norms on both sides of every block."""
    torch.manual_seed(4)
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return _randomised(Gemma3ForCausalLM(config))


def _randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough that rounding them moves the logits."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return model.to(torch.bfloat16).eval()


BUILDERS = {
    "scout": lambda: build_llama4(moe_every=1),
    "maverick": lambda: build_llama4(moe_every=2),
    "llama": build_llama,
}


# Wide enough for every block and group there is.
WIDE_BUILDERS = {
    "wide-llama": lambda: build_llama(hidden_size=128, intermediate_size=256, num_key_value_heads=4),
    "wide-scout": lambda: build_llama4(
        moe_every=1, hidden_size=128, intermediate_size=128, head_dim=32, num_hidden_layers=2, num_local_experts=2
    ),
}
