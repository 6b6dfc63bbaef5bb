"""Streamed rows: the same for any ranks, from any step, after any resume."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from herd.data.corpora import StreamedCorpus, open_corpus
from herd.data.encoding import encode_documents
from herd.data.streamed_rows import BLOCK_ROWS, StreamedRows
from herd.data.streams import fixed_batches, open_rows
from herd.run.errors import DataError
from herd.run.schema import Config, Data, Run, Student

ROWS = 48
LENGTH = 32


@pytest.fixture(scope="module", params=["jsonl", "text"])
def streamed(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StreamedCorpus:
    """The shared texts as a streamed corpus, from two shards of jsonl or from the text files."""
    root = folder
    if request.param == "jsonl":
        root = tmp_path_factory.mktemp("jsonl")
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt"))]
        for shard in range(2):
            lines = [json.dumps({"text": text}) + "\n" for text in texts[shard::2]]
            (root / f"{shard}.jsonl").write_text("".join(lines))
    corpus = open_corpus(Data(source=str(root), streaming=True))
    assert isinstance(corpus, StreamedCorpus)
    return corpus


@pytest.fixture
def source(streamed: StreamedCorpus, tokenizer) -> StreamedRows:
    return StreamedRows(streamed, tokenizer, "train", LENGTH, seed=3)


def keys(source: StreamedRows, step: int, *, world: int = 1, micro_rows: int = ROWS) -> list[int]:
    taken = [source.take(step, rows=ROWS, micro_rows=micro_rows, rank=rank, world=world) for rank in range(world)]
    return [key for micro in zip(*taken, strict=True) for batch in micro for key in batch.keys_B.tolist()]


STEPS = 4 * BLOCK_ROWS // ROWS


def test_the_order_is_the_same_for_any_ranks_and_accumulation(source: StreamedRows):
    for step in range(3):
        expected = keys(source, step)
        assert keys(source, step, world=2, micro_rows=8) == expected
        assert keys(source, step, world=4, micro_rows=3) == expected


def test_the_text_is_predicted_once_an_epoch(source: StreamedRows, streamed: StreamedCorpus, tokenizer):
    run = np.concatenate([document.tokens_L for document in encode_documents(streamed.documents("train"), tokenizer)])
    batches = [source.take(step, rows=BLOCK_ROWS, micro_rows=BLOCK_ROWS, rank=0, world=1)[0] for step in range(2)]
    found = sorted(tuple(row) for batch in batches for row in batch.labels_BT.tolist())
    twice = np.concatenate((run, run, run))
    rows = np.lib.stride_tricks.sliding_window_view(twice[1:], LENGTH)[::LENGTH][: 2 * BLOCK_ROWS]
    assert found == sorted(tuple(row) for row in rows.tolist())


@pytest.mark.parametrize("place", [1, 9, 11, 25, STEPS - 2])
def test_resuming_from_saved_json_gives_the_same_rows(place: int, source: StreamedRows, streamed, tokenizer):
    whole = [keys(source, step) for step in range(place)]
    state = json.loads(json.dumps(source.state_dict()))
    rest = [keys(source, step) for step in range(place, STEPS)]
    assert len({key for step in whole + rest for key in step}) > len(whole)
    resumed = StreamedRows(streamed, tokenizer, "train", LENGTH, seed=3)
    resumed.load_state_dict(state)
    assert [keys(resumed, step) for step in range(place, STEPS)] == rest


def test_what_a_step_holds_does_not_depend_on_earlier_calls(source: StreamedRows):
    in_order = [keys(source, step) for step in range(STEPS)]
    assert keys(source, 2) == in_order[2]
    assert keys(source, STEPS - 1) == in_order[-1]


def test_rows_are_shuffled_inside_a_block_and_by_the_seed(source: StreamedRows, streamed, tokenizer):
    other = StreamedRows(streamed, tokenizer, "train", LENGTH, seed=4)
    (mine,), (theirs,) = (s.take(0, rows=BLOCK_ROWS, micro_rows=BLOCK_ROWS, rank=0, world=1) for s in (source, other))
    assert mine.keys_B.tolist() != theirs.keys_B.tolist()
    assert sorted(mine.keys_B.tolist()) == sorted(theirs.keys_B.tolist())


def test_the_end_of_the_text_is_told_once(source: StreamedRows, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        for step in range(STEPS):
            keys(source, step)
    (record,) = caplog.records
    assert "read to its end; epoch 2 begins" in record.getMessage()


def test_a_position_over_another_text_is_refused(source: StreamedRows, tokenizer, tmp_path: Path):
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"another text {number} " * 20)
    corpus = open_corpus(Data(source=str(tmp_path), streaming=True))
    other = StreamedRows(corpus, tokenizer, "train", LENGTH, seed=3)
    with pytest.raises(DataError, match="not those of the checkpoint"):
        other.load_state_dict(source.state_dict())


def test_a_stream_without_text_is_an_error_and_no_endless_search(tokenizer, tmp_path: Path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("   \n")
    with pytest.raises(DataError, match=r"the train part of .* has no text"):
        StreamedRows(open_corpus(Data(source=str(tmp_path), streaming=True)), tokenizer, "train", LENGTH, seed=3)


def test_a_streaming_configuration_opens_streamed_rows_and_fixed_ones(folder: Path, tokenizer, cache: Path):
    data = Data(source=str(folder), streaming=True, sequence_length=LENGTH, heldout_fraction=0.2)
    config = Config(run=Run(name="x", steps=1), data=data, students={"a": Student(source="scout-nano")})
    source = open_rows(config, tokenizer, "train", cache=cache)
    assert isinstance(source, StreamedRows)
    heldout = fixed_batches(data, tokenizer, "heldout", rows=20, cache=cache)
    assert sum(len(batch.keys_B) for batch in heldout) == 20
    taken = source.take(0, rows=64, micro_rows=64, rank=0, world=1)[0]
    assert not set(taken.keys_B.tolist()) & {key for batch in heldout for key in batch.keys_B.tolist()}
