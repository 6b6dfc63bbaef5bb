"""Several named sources: packed alone, mixed by weight, one order for any ranks, resumable; nothing lost or shared."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.data.corpora import MixedCorpus, open_corpus
from herd.data.mixture import BLOCK, Mixture, apportion
from herd.data.streams import fixed_batches, open_rows
from herd.run.errors import DataError
from herd.run.schema import Config, Data, Run, Student

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


def mixed_data(folder: Path, **settings) -> Data:
    """The two halves of the corpus as two sources; notes come twice as often."""
    sources = {
        "code": {"source": str(folder / "code"), **settings},
        "notes": {"source": str(folder / "notes"), "weight": 2.0},
    }
    return Data(sources=sources, sequence_length=32, heldout_fraction=0.2, calibration_fraction=0.1)


def rows_of(data: Data, tokenizer, cache):
    config = Config(run=Run(name="t", steps=1), data=data, students={"s": Student(source="scout-nano")})
    return open_rows(config, tokenizer, "train", cache=cache)


def taken(source, steps, *, micro_rows=2, world=1) -> list[tuple[int, int]]:
    """(source, key) of every row of these steps of 8, in their global order."""
    out = []
    for step in steps:
        ranks = [source.take(step, rows=8, micro_rows=micro_rows, rank=rank, world=world) for rank in range(world)]
        for micro in zip(*ranks, strict=True):
            for batch in micro:
                out += list(zip(batch.sources_B.tolist(), batch.keys_B.tolist(), strict=True))
    return out


@given(WEIGHTS, st.one_of(st.none(), st.integers(0, 3)), st.integers(0, 5000), st.integers(1, 3000))
def test_every_place_holds_the_next_row_of_its_source(weights, seed, start, count):
    mixture = Mixture(weights, seed=seed)
    source_R, place_R = mixture.at(np.arange(start + count))
    for number in range(len(weights)):
        assert place_R[source_R == number].tolist() == list(range((source_R == number).sum()))
    alone = mixture.at(np.arange(start, start + count))
    assert np.array_equal(alone[0], source_R[start:]) and np.array_equal(alone[1], place_R[start:])


@given(WEIGHTS, st.integers(0, 3), st.integers(1, BLOCK))
def test_shares_follow_the_weights_in_any_beginning(weights, seed, count):
    source_R, _ = Mixture(weights, seed=seed).at(np.arange(count))
    shares = apportion(weights, BLOCK) / BLOCK
    for number, share in enumerate(shares):
        assert abs((source_R == number).sum() - share * count) <= len(weights)
    exact = np.array(weights) / sum(weights)
    assert np.abs(shares - exact).max() <= (len(weights) + 1) / BLOCK


def test_without_a_seed_the_first_rows_are_one_of_each_source():
    assert sorted(Mixture([1, 500, 20], seed=None).at(np.arange(3))[0]) == [0, 1, 2]


def test_one_named_source_has_the_rows_of_the_single_form(data, tokenizer, cache):
    named = Data(sources={"only": {"source": data.source}}, **data.model_dump(exclude={"source", "sources", *UNSAID}))
    one, many = rows_of(data, tokenizer, cache), rows_of(named, tokenizer, cache)
    for step in (0, 3, 40, 500):
        pairs = zip(one.take(step, **WHOLE), many.take(step, **WHOLE), strict=True)
        for mine, theirs in pairs:
            assert torch.equal(mine.input_ids_BT, theirs.input_ids_BT) and torch.equal(mine.keys_B, theirs.keys_B)
            assert torch.equal(mine.bytes_B, theirs.bytes_B) and theirs.sources_B.unique().tolist() == [0]
    for part in ("heldout", "calibration"):
        mine, theirs = (fixed_batches(which, tokenizer, part, rows=12, cache=cache) for which in (data, named))
        assert [b.keys_B.tolist() for b in mine] == [b.keys_B.tolist() for b in theirs]


UNSAID = {"subset", "split", "text_field", "streaming"}
WHOLE = {"rows": 8, "micro_rows": 4, "rank": 0, "world": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_the_order_is_the_same_for_any_ranks_and_accumulation_and_goes_on_alike(streaming, folder, tokenizer, cache):
    data = mixed_data(folder, streaming=streaming)
    whole = taken(rows_of(data, tokenizer, cache), range(12))
    for world, micro_rows in ((1, 8), (2, 1), (4, 2)):
        assert taken(rows_of(data, tokenizer, cache), range(12), micro_rows=micro_rows, world=world) == whole
    source = rows_of(data, tokenizer, cache)
    taken(source, range(7))
    resumed = rows_of(data, tokenizer, cache)
    resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert taken(resumed, range(7, 12)) == whole[7 * 8 :]


def test_a_row_has_one_source_and_no_token_of_another(folder, tokenizer, cache):
    data = mixed_data(folder)
    mixed = taken(rows_of(data, tokenizer, cache), range(60))
    assert 1.9 < Counter(source for source, _ in mixed)[1] / Counter(source for source, _ in mixed)[0] < 2.1
    for number, name in enumerate(data.sources):
        alone = rows_of(data.alone(name), tokenizer, cache)
        order = [
            key
            for step in range(60)
            for batch in alone.take(step, rows=8, micro_rows=8, rank=0, world=1)
            for key in batch.keys_B.tolist()
        ]
        mine = [key for source, key in mixed if source == number]
        assert mine == order[: len(mine)]


def test_fixed_rows_come_from_every_source_and_more_begin_with_the_fewer(folder, tokenizer, cache):
    def keys(rows):
        batches = fixed_batches(mixed_data(folder), tokenizer, "heldout", rows=rows, rows_per_batch=3, cache=cache)
        return [pair for b in batches for pair in zip(b.sources_B.tolist(), b.keys_B.tolist(), strict=True)]

    two, nine = keys(2), keys(9)
    assert {source for source, _ in two} == {0, 1} and nine[:2] == two and len(set(nine)) == 9


def test_a_position_of_other_weights_is_refused(folder, tokenizer, cache):
    data = mixed_data(folder)
    other = data.model_copy(
        update={"sources": {**data.sources, "code": data.sources["code"].model_copy(update={"weight": 3.0})}}
    )
    with pytest.raises(DataError, match="not those of the checkpoint"):
        rows_of(other, tokenizer, cache).load_state_dict(rows_of(data, tokenizer, cache).state_dict())


def test_a_mixed_corpus_keeps_each_fingerprint_and_names_the_source_that_is_not_there(folder):
    corpus = open_corpus(mixed_data(folder))
    assert isinstance(corpus, MixedCorpus)
    alone = open_corpus(mixed_data(folder).alone("notes"))
    assert corpus.corpora["notes"].fingerprint == alone.fingerprint != corpus.fingerprint
    ids = [document.id for document in corpus.documents("heldout")]
    assert {name.split("/")[0] for name in ids} == {"code", "notes"} and len(set(ids)) == len(ids)
    with pytest.raises(DataError, match=r"^data\.sources\.gone: data\.source = .*nowhere: no such file"):
        open_corpus(Data(sources={"gone": {"source": str(folder / "nowhere")}}))
