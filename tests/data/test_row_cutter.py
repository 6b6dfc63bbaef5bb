"""Rows predict every token once, name where they come from, and count their bytes."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from herd.data.encoding import EncodedDocument
from herd.data.row_cutter import CutRows, CutterState, RowCutter, row_key

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def run_of(lengths: list[int]) -> list[EncodedDocument]:
    """Documents whose tokens are 0, 1, 2 ... through the run, each worth 3 bytes more than its number."""
    ends = np.cumsum(lengths)
    spans = [np.arange(end - length, end, dtype=np.uint32) for end, length in zip(ends, lengths, strict=True)]
    return [EncodedDocument(f"doc{n}", span, span + 3) for n, span in enumerate(spans)]


def cut(documents: list[EncodedDocument], length: int) -> list[CutRows]:
    cutter = RowCutter(length)
    return [cutter.add(document) for document in documents]


@given(lengths, st.integers(1, 16))
def test_every_token_but_the_first_is_predicted_exactly_once(lengths: list[int], length: int):
    rows = np.concatenate([part.rows_NT1 for part in cut(run_of(lengths), length)])
    total = sum(lengths)
    assert len(rows) == (total - 1) // length
    assert rows[:, 1:].ravel().tolist() == list(range(1, len(rows) * length + 1))
    assert np.array_equal(rows[1:, 0], rows[:-1, -1])
    assert total - 1 - len(rows) * length < length


@given(lengths, st.integers(1, 16))
def test_a_row_is_named_by_the_document_and_offset_of_its_first_token(lengths: list[int], length: int):
    documents = run_of(lengths)
    for part in cut(documents, length):
        for row, name, offset in zip(part.rows_NT1, part.documents_N, part.offsets_N, strict=True):
            document = next(document for document in documents if document.document_id == name)
            assert document.tokens_L[offset] == row[0]


@given(lengths, st.integers(1, 16))
def test_a_row_counts_the_bytes_of_the_tokens_it_predicts(lengths: list[int], length: int):
    for part in cut(run_of(lengths), length):
        assert part.bytes_N.tolist() == (part.rows_NT1[:, 1:].astype(np.int64) + 3).sum(axis=1).tolist()


@given(lengths, st.integers(1, 16), st.data())
def test_a_cutter_restored_from_json_goes_on_alike(lengths: list[int], length: int, data):
    documents = run_of(lengths)
    place = data.draw(st.integers(0, len(documents)))
    first, second = RowCutter(length), RowCutter(length)
    for document in documents[:place]:
        first.add(document)
    second.restore(CutterState.from_plain(json.loads(json.dumps(first.state().plain()))))
    for document in documents[place:]:
        expected, found = first.add(document), second.add(document)
        assert np.array_equal(expected.rows_NT1, found.rows_NT1)
        assert expected.keys_N.tolist() == found.keys_N.tolist()
        assert expected.documents_N == found.documents_N
        assert expected.bytes_N.tolist() == found.bytes_N.tolist()


def test_a_key_changes_with_a_token_the_document_and_the_offset():
    row = np.arange(5, dtype=np.uint32)
    other = row.copy()
    other[4] = 9
    keys = {row_key(row, "a", 0), row_key(other, "a", 0), row_key(row, "b", 0), row_key(row, "a", 1)}
    assert len(keys) == 4
    assert row_key(row, "a", 0) == row_key(row.astype(np.int64), "a", 0)
    assert all(-(2**63) <= key < 2**63 for key in keys)
