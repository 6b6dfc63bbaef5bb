"""Builds transformers' own Llama 4 from a spec.

model = build("scout-nano", overrides={"vocab_size": 8192}, dtype=torch.bfloat16, seed=0)
with torch.device("meta"):
    giant = build("maverick")                 # shapes only, no memory
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Llama4ForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

from herd.llama4.specs import Spec, find_spec
from herd.run import bf16_products


def build(
    spec: Spec | str,
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
) -> Llama4ForCausalLM:
    """Return a freshly initialised model: embeddings normal(0, 1), other weights normal(0, 0.02), norms at one.

    With `seed` the weights depend on it alone and the global random state is left untouched; without, they are drawn
    from the global state. Weights are drawn in fp32 and then cast, so dtypes share one initialisation.
    Raises ConfigError for an unknown spec or a bad override.
    """
    spec = find_spec(spec) if isinstance(spec, str) else spec
    bf16_products.install()
    config = spec.config(**(overrides or {}))
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = Llama4ForCausalLM(config)
    if not config.tie_word_embeddings:
        # As small as the other weights, a token's own vector drowns in what the first blocks add to it, all of them
        # near noise: nano models then stay at the unigram loss for long (docs/experiments.md).
        model.get_input_embeddings().weight.data.div_(config.initializer_range)
    # Parameters only: Module.to would also round the RoPE frequencies (see restore_rope).
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    config.dtype = dtype
    return model


def restore_rope(model: nn.Module) -> nn.Module:
    """Give every RoPE its exact fp32 frequencies back, in place, and return the model.

    `Module.bfloat16()`, which DeepSpeed calls on a bf16 model, rounds the frequency buffers too: at position p the
    angle is then off by up to p / 256 radians, and since the buffers are not saved, the model that a checkpoint loads
    into is another one. Call it after `deepspeed.initialize` (or `model.bfloat16()`).
    """
    for module in model.modules():
        if isinstance(module, Llama4TextRotaryEmbedding):
            device = module.inv_freq.device
            fresh = Llama4TextRotaryEmbedding(module.config)
            module.inv_freq = fresh.inv_freq.to(device)
            module.original_inv_freq = fresh.original_inv_freq.to(device)
    return model
