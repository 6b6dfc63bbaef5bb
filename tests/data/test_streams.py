"""One order of rows for any number of ranks and any accumulation, resumable at every step."""

import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.data.batches import Batch
from herd.data.packing import PackedRows
from herd.data.streams import RowStream, fixed_batches, open_rows
from herd.run.errors import ConfigError, DataError
from herd.run.schema import Config, Run, Student


def numbered(count: int, length: int = 4, fingerprint: str = "f") -> PackedRows:
    """Rows whose tokens and key are their index."""
    rows = np.repeat(np.arange(count, dtype=np.uint32)[:, None], length + 1, axis=1)
    first = np.stack([np.zeros(count, dtype=np.int64), np.arange(count)], axis=1)
    return PackedRows(fingerprint, rows, np.arange(count), np.full(count, 3), first, ["doc"], 0)


def global_order(source, step: int, *, rows: int, micro_rows: int, world: int) -> list[int]:
    """Keys of a step's rows, put together from what every rank took."""
    taken = [source.take(step, rows=rows, micro_rows=micro_rows, rank=rank, world=world) for rank in range(world)]
    return [key for micro in zip(*taken, strict=True) for batch in micro for key in batch.keys_B.tolist()]


@given(st.integers(1, 300), st.integers(0, 50), st.sampled_from([8, 16]), st.integers(0, 3))
def test_the_order_is_the_same_for_any_ranks_and_accumulation(count: int, step: int, rows: int, seed: int):
    source = RowStream(numbered(count), seed=seed)
    expected = source.rows_of_step(step, rows).tolist()
    for world in (1, 2, 4):
        for micro_rows in (1, 2, rows // world):
            assert global_order(source, step, rows=rows, micro_rows=micro_rows, world=world) == expected


@given(st.integers(1, 200), st.integers(1, 17), st.integers(0, 3))
def test_every_row_comes_once_an_epoch(count: int, rows: int, seed: int):
    source = RowStream(numbered(count), seed=seed)
    steps = -(-3 * count // rows)
    run = np.concatenate([source.rows_of_step(step, rows) for step in range(steps)])
    for epoch in range(3):
        assert sorted(run[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_their_own_orders():
    source, other = RowStream(numbered(64), seed=0), RowStream(numbered(64), seed=1)
    first, second = source.rows_of_step(0, 64).tolist(), source.rows_of_step(1, 64).tolist()
    assert first != second and first != other.rows_of_step(0, 64).tolist() and first != list(range(64))


def test_a_stream_opened_in_mid_epoch_goes_on_alike():
    source = RowStream(numbered(37), seed=5)
    whole = [global_order(source, step, rows=8, micro_rows=2, world=2) for step in range(20)]
    state = json.loads(json.dumps(source.state_dict()))
    resumed = RowStream(numbered(37), seed=5)
    resumed.load_state_dict(state)
    assert [global_order(resumed, step, rows=8, micro_rows=2, world=2) for step in range(7, 20)] == whole[7:]


def test_a_position_of_other_rows_or_another_seed_is_refused():
    state = RowStream(numbered(37), seed=5).state_dict()
    with pytest.raises(DataError, match="not those of the checkpoint"):
        RowStream(numbered(37, fingerprint="g"), seed=5).load_state_dict(state)
    with pytest.raises(DataError, match=r"run\.seed = 6, but the checkpoint has 5"):
        RowStream(numbered(37), seed=6).load_state_dict(state)


def test_rows_that_do_not_split_evenly_are_refused():
    with pytest.raises(ConfigError, match=r"batch\.rows = 8 is not a multiple .* = 3 x 2"):
        RowStream(numbered(9), seed=0).take(0, rows=8, micro_rows=3, rank=0, world=2)


def test_the_end_of_the_rows_is_told_once_and_by_one_rank(caplog: pytest.LogCaptureFixture):
    source, other = RowStream(numbered(20), seed=0), RowStream(numbered(20), seed=0)
    with caplog.at_level(logging.WARNING):
        for step in range(12):
            source.take(step, rows=8, micro_rows=4, rank=0, world=2)
            other.take(step, rows=8, micro_rows=4, rank=1, world=2)
    (record,) = caplog.records
    assert record.getMessage().startswith("step 2: all 20 training rows have been read; epoch 2 ")


@pytest.fixture
def config(data) -> Config:
    return Config(run=Run(name="x", steps=1, seed=3), data=data, students={"a": Student(source="scout-nano")})


def test_labels_are_the_next_tokens_of_the_text(config: Config, tokenizer, corpus, cache):
    source = open_rows(config, tokenizer, "train", cache=cache)
    first, second = source.take(0, rows=8, micro_rows=4, rank=0, world=1)
    assert first.input_ids_BT.shape == first.labels_BT.shape == (4, 32)
    assert first.input_ids_BT.dtype == first.labels_BT.dtype == first.keys_B.dtype == first.bytes_B.dtype == torch.int64
    assert torch.equal(first.input_ids_BT[:, 1:], first.labels_BT[:, :-1])
    text = "".join(document.text for document in corpus.documents("train"))
    row = tokenizer.decode([*second.input_ids_BT[0].tolist(), int(second.labels_BT[0, -1])])
    assert all(piece in text for piece in row.split("<|end_of_text|><|begin_of_text|>"))


def test_fixed_rows_do_not_change_with_seed_batch_size_or_number(config: Config, tokenizer, cache):
    def keys(batches: list[Batch]) -> list[int]:
        return [key for batch in batches for key in batch.keys_B.tolist()]

    few, many = (fixed_batches(config.data, tokenizer, "heldout", rows=rows, cache=cache) for rows in (10, 30))
    assert [len(batch.keys_B) for batch in few] == [8, 2]
    assert keys(few) == keys(many)[:10]
    by_five = fixed_batches(config.data, tokenizer, "heldout", rows=30, rows_per_batch=5, cache=cache)
    assert keys(by_five) == keys(many) and len(set(keys(many))) == 30
    trained = open_rows(config, tokenizer, "train", cache=cache).take(0, rows=64, micro_rows=64, rank=0, world=1)
    assert not set(keys(trained)) & set(keys(many))


def test_fixed_rows_are_all_there_are_when_more_are_asked_for(config: Config, tokenizer, cache):
    batches = fixed_batches(config.data, tokenizer, "calibration", rows=100_000, rows_per_batch=64, cache=cache)
    assert sum(len(batch.keys_B) for batch in batches) > 10
