"""The growing cache returns what transformers' returns, and writes in place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, Llama4TextConfig

from quant.runtime.caches import ROOM, GrowingLayer, append, growing_cache

CONFIG = Llama4TextConfig(num_hidden_layers=4, attention_chunk_size=8, no_rope_layers=[1, 1, 1, 0])


def states(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, length, 4, generator=generator), torch.randn(2, 3, length, 4, generator=generator)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.sampled_from([0, 3]))
def test_every_update_returns_what_transformers_returns(lengths, index):
    ours, theirs = growing_cache(CONFIG), DynamicCache(config=CONFIG)
    assert ours.is_sliding == theirs.is_sliding
    for seed, length in enumerate(lengths):
        assert ours.get_mask_sizes(length, index) == theirs.get_mask_sizes(length, index)
        found, wanted = (cache.update(*states(length, seed), index) for cache in (ours, theirs))
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        assert ours.get_seq_length(index) == theirs.get_seq_length(index)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-3),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
        lambda layer: layer.reset(),
    ],
)
def test_what_generation_does_to_a_cache_leaves_it_right(change):
    ours, theirs = growing_cache(CONFIG), DynamicCache(config=CONFIG)
    for cache in (ours, theirs):
        cache.update(*states(10, 0), 3)
        change(cache.layers[3])
    batch = len(theirs.layers[3].keys) if theirs.layers[3].is_initialized else 2
    new = torch.randn(batch, 3, 1, 4)
    assert torch.equal(ours.update(new, new, 3)[0], theirs.update(new, new, 3)[0])


def test_a_token_is_written_in_place_and_nothing_is_copied():
    layer = GrowingLayer()
    layer.update(*states(5, 0))
    place = layer.keys.data_ptr()
    for seed in range(ROOM - 5):
        layer.update(*states(1, seed))
    assert layer.keys.data_ptr() == place
    layer.update(*states(1, 0))
    assert layer.keys.data_ptr() != place and layer.keys.shape[2] == ROOM + 1


def test_a_cache_filled_in_inference_mode_goes_on_outside_it():
    with torch.inference_mode():
        past = append(torch.ones(1, 1, 0, 2), torch.ones(1, 1, 3, 2))
    assert torch.equal(append(past, torch.zeros(1, 1, 1, 2))[0, 0, :, 0], torch.tensor([1.0, 1.0, 1.0, 0.0]))
