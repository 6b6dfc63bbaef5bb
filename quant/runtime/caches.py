"""A key-value cache that grows in place: appending a token writes one row, where transformers' own copies them all.

    cache = growing_cache(config);  model(input_ids=..., past_key_values=cache, use_cache=True)

B rows, N key heads, L cached tokens, D head dimension.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 256  # tokens a new buffer has room for at least


class GrowingLayer(DynamicLayer):
    """transformers' layer of unlimited length over a buffer with room to spare."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append [B, N, T, D] and return all [B, N, L + T, D]."""
        if not self.is_initialized:
            _start(self, key_states, value_states)
        self.keys, self.values = append(self.keys, key_states), append(self.values, value_states)
        return self.keys, self.values


class GrowingWindowLayer(DynamicSlidingWindowLayer):
    """The same for chunked attention: it keeps a window of tokens and returns the new ones after what it kept."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append [B, N, T, D] and return as many of the last tokens as transformers' layer does."""
        if not self.is_initialized:
            _start(self, key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keys, values = append(self.keys, key_states), append(self.values, value_states)
        kept = keys.shape[2] if self.record_past else self.sliding_window - 1
        self.keys, self.values = keys[:, :, -kept:], values[:, :, -kept:]
        seen = self.sliding_window - 1 + key_states.shape[-2]
        return keys[:, :, -seen:], values[:, :, -seen:]


def growing_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a model's text configuration, with transformers' choice of layers."""
    cache = DynamicCache(config=config)
    cache.layers = [_growing(layer) for layer in cache.layers]
    return cache


def _growing(layer: DynamicLayer) -> DynamicLayer:
    if type(layer) is DynamicSlidingWindowLayer:
        return GrowingWindowLayer(sliding_window=layer.sliding_window)
    return GrowingLayer() if type(layer) is DynamicLayer else layer


def _start(layer: DynamicLayer, key_states: Tensor, value_states: Tensor) -> None:
    layer.lazy_initialization(key_states, value_states)
    layer.keys, layer.values = key_states[:, :, :0], value_states[:, :, :0]


def append(past_BNLD: Tensor, new_BNTD: Tensor) -> Tensor:
    """Past and new tokens together, in the past's own buffer where there is room behind it, else in a larger one.

    The room is read off the strides: a head's tokens lie `stride(1)` elements from the next head's. Whatever slices or
    copies a cache (cropping, beam search) leaves tensors of which that holds.
    """
    batch, heads, length, width = past_BNLD.shape
    total, row = length + new_BNTD.shape[2], past_BNLD.stride(1)
    closed = past_BNLD.is_inference() and not torch.is_inference_mode_enabled()  # torch forbids writing to it
    if not length or closed or past_BNLD.storage_offset() % row // width + total > row // width:
        buffer_BNLD = past_BNLD.new_empty(batch, heads, max(ROOM, total + total // 2), width)
        whole_BNLD = buffer_BNLD[:, :, :total]
        whole_BNLD[:, :, :length] = past_BNLD
    else:
        whole_BNLD = past_BNLD.as_strided((batch, heads, total, width), past_BNLD.stride(), past_BNLD.storage_offset())
    whole_BNLD[:, :, length:] = new_BNTD
    return whole_BNLD
