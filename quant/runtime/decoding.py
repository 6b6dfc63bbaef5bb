"""One token a row through a Llama 4, without what transformers does around it: masks, hooks, copies of the cache.

    use_lean_steps(model)      # a Llama4TextModel, in place; prompts and unusual calls still go transformers' way

transformers' own layers are the reference: tests compare the two. B rows, H hidden, N query and C key heads,
R = N / C query heads a key head, D head dimension, L cached tokens, V = D / 2 rotated pairs.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.llama4.modeling_llama4 import (
    Llama4TextAttention,
    Llama4TextConfig,
    Llama4TextDecoderLayer,
    Llama4TextModel,
    Llama4TextRMSNorm,
)

from quant.runtime.caches import growing_cache
from quant.runtime.feed_forward import RoutedMoe
from quant.runtime.linears import multiply

RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")


class Steps:
    """A text model's forward whose single-token steps are lean, over the model's own weights."""

    def __init__(self, model: Llama4TextModel):
        self.model = model
        self.blocks = [Block(layer, model.config) for layer in model.layers]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple | MoeModelOutputWithPast:
        """As Llama4TextModel's, which takes every call that is no plain step."""
        model = self.model
        use_cache = model.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = growing_cache(model.config)
        recorded = any(kwargs.get(name, getattr(model.config, name, False)) for name in RECORDED)
        if use_cache and not recorded and is_step(input_ids, attention_mask, position_ids, past_key_values):
            return self.step(input_ids, past_key_values)
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        return type(model).forward(model, *given, use_cache=use_cache, **kwargs)

    def step(self, input_B1: Tensor, cache: Cache) -> MoeModelOutputWithPast:
        """The last hidden state [B, 1, H] after one token more; the cache takes it up."""
        position = cache.get_seq_length()
        hidden_BH = F.embedding(input_B1[:, 0], self.model.embed_tokens.weight)
        turn_V = self.model.rotary_emb(hidden_BH, torch.tensor([[position]]))[0, 0]
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            hidden_BH = block.step(hidden_BH, layer, turn_V, position)
        hidden_BH = normalise(hidden_BH, self.model.norm)
        return MoeModelOutputWithPast(last_hidden_state=hidden_BH[:, None], past_key_values=cache)


class Block:
    """One decoder layer's single-token step over that layer's own weights."""

    def __init__(self, layer: Llama4TextDecoderLayer, config: Llama4TextConfig):
        self.layer, self.attention = layer, layer.self_attn
        self.qkv_weight = fuse_rows([self.attention.q_proj, self.attention.k_proj, self.attention.v_proj])
        self.keys, self.width = config.num_key_value_heads, self.attention.head_dim
        self.queries = config.num_attention_heads
        chunked = config.layer_types[self.attention.layer_idx] == "chunked_attention"
        self.chunk = config.attention_chunk_size if chunked else None

    def step(self, hidden_BH: Tensor, cache: DynamicLayer, turn_V: Tensor, position: int) -> Tensor:
        """[B, H] -> [B, H], as Llama4TextDecoderLayer's forward."""
        layer = self.layer
        hidden_BH = hidden_BH + self.attend(normalise(hidden_BH, layer.input_layernorm), cache, turn_V, position)
        inner_BH = normalise(hidden_BH, layer.post_attention_layernorm)
        outer = layer.feed_forward(inner_BH)
        return hidden_BH + (outer[0] if isinstance(layer.feed_forward, RoutedMoe) else outer)

    def attend(self, hidden_BH: Tensor, cache: DynamicLayer, turn_V: Tensor, position: int) -> Tensor:
        """[B, H] -> [B, H], as Llama4TextAttention's forward."""
        attention, rows = self.attention, len(hidden_BH)
        heads_BAD = self.project(hidden_BH).view(rows, -1, self.width)
        turned_BAD, values_BCD = heads_BAD.split((self.queries + self.keys, self.keys), 1)
        if attention.use_rope:
            turned_BAD = rotate(turned_BAD, turn_V)
            if attention.config.use_qk_norm:
                turned_BAD = F.rms_norm(turned_BAD, (self.width,), None, attention.qk_norm.eps)
        queries_BND, keys_BCD = turned_BAD.split((self.queries, self.keys), 1)
        queries_BND = temper(queries_BND, attention, position)
        keys_BCLD, values_BCLD = cache.update(keys_BCD[:, :, None], values_BCD[:, :, None])
        if self.chunk is not None:
            visible = position % self.chunk + 1
            keys_BCLD, values_BCLD = keys_BCLD[:, :, -visible:], values_BCLD[:, :, -visible:]
        # Query heads that share a key head take the place of query positions: nothing is repeated, nothing masked.
        queries_BCRD = queries_BND.reshape(rows, self.keys, -1, self.width)
        mixed_BCRD = F.scaled_dot_product_attention(queries_BCRD, keys_BCLD, values_BCLD, scale=attention.scaling)
        return project(mixed_BCRD.reshape(rows, -1), attention.o_proj)

    def project(self, hidden_BH: Tensor) -> Tensor:
        """Queries, keys and values side by side."""
        if self.qkv_weight is not None:
            return multiply(hidden_BH, self.qkv_weight)
        attention = self.attention
        return torch.cat([proj(hidden_BH) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)], 1)


def is_step(input_ids: Tensor | None, mask: Tensor | dict | None, positions: Tensor | None, cache: Cache) -> bool:
    """One new token a row, nothing padded, and a cache that holds all tokens before."""
    if input_ids is None or input_ids.shape[1] != 1 or not all(isinstance(part, DynamicLayer) for part in cache.layers):
        return False
    position = cache.get_seq_length()
    whole = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all()))
    return position > 0 and whole and (positions is None or bool((positions == position).all()))


def use_lean_steps(model: Llama4TextModel) -> None:
    """Give a text model whose weights are in place lean single-token steps, in place; its class stays."""
    model.forward = Steps(model).forward


def fuse_rows(projections: list[nn.Module]) -> Tensor | None:
    """One weight for plain layers over the same input, which become views of it; None for layers of another kind."""
    if not all(type(projection) is nn.Linear and projection.bias is None for projection in projections):
        return None
    fused = torch.cat([projection.weight.detach() for projection in projections])
    parts = fused.split([projection.out_features for projection in projections])
    for projection, part in zip(projections, parts, strict=True):
        projection.weight = nn.Parameter(part, requires_grad=False)
    return fused


def project(input_BH: Tensor, projection: nn.Module) -> Tensor:
    """A linear layer of any kind; plain ones through the faster product."""
    if type(projection) is nn.Linear and projection.bias is None:
        return multiply(input_BH, projection.weight)
    return projection(input_BH)


def normalise(hidden_BH: Tensor, norm: Llama4TextRMSNorm) -> Tensor:
    """Llama4TextRMSNorm, its two roundings included."""
    return F.rms_norm(hidden_BH, norm.weight.shape, None, norm.eps) * norm.weight


def rotate(heads_BAD: Tensor, turn_V: Tensor) -> Tensor:
    """Rotary embedding of heads at one position: pairs of channels as complex numbers, in fp32."""
    pairs_BAV = torch.view_as_complex(heads_BAD.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs_BAV * turn_V).flatten(-2).to(heads_BAD.dtype)


def temper(queries_BND: Tensor, attention: Llama4TextAttention, position: int) -> Tensor:
    """Llama 4's attention temperature in layers without rotary embedding; 1 before `floor_scale` tokens."""
    steps = math.floor((position + 1) / attention.floor_scale)
    if attention.use_rope or not attention.attn_temperature_tuning or steps == 0:
        return queries_BND
    scale = math.log1p(steps) * attention.attn_scale + 1.0
    return (queries_BND.float() * scale).to(queries_BND.dtype)
