"""Packed rows hold the corpus's tokens in order, name their places, and survive damage on disk."""

from pathlib import Path

import numpy as np
import pytest

from herd.data.encoding import encode_documents
from herd.data.packing import pack_rows
from herd.data.splits import PARTS
from herd.run.errors import DataError


def test_rows_are_the_parts_tokens_cut_once(corpus, tokenizer, cache: Path):
    packed = pack_rows(corpus, tokenizer, "train", 32, cache=cache)
    encoded = list(encode_documents(corpus.documents("train"), tokenizer))
    run = np.concatenate([document.tokens_L for document in encoded])
    assert packed.rows_NT1.dtype == np.uint32 and isinstance(packed.rows_NT1, np.memmap)
    assert packed.sequence_length == 32
    assert packed.rows_NT1[:, 1:].ravel().tolist() == run[1 : len(packed) * 32 + 1].tolist()
    assert len(packed) * 32 + packed.left_over_tokens == len(run) - 1
    assert packed.left_over_tokens < 32
    sizes = np.concatenate([document.bytes_L for document in encoded])
    assert packed.bytes_N.sum() == sizes[1 : len(packed) * 32 + 1].sum()


def test_every_row_names_a_document_and_a_place_in_it(corpus, tokenizer, cache: Path):
    packed = pack_rows(corpus, tokenizer, "heldout", 32, cache=cache)
    tokens = {
        document.document_id: document.tokens_L for document in encode_documents(corpus.documents("heldout"), tokenizer)
    }
    for index in range(len(packed)):
        document, offset = packed.row_id(index)
        assert tokens[document][offset] == packed.rows_NT1[index, 0]
    assert len(set(packed.keys_N.tolist())) == len(packed)


def test_no_text_is_in_two_parts(corpus, tokenizer, cache: Path):
    keys = [set(pack_rows(corpus, tokenizer, part, 32, cache=cache).keys_N.tolist()) for part in PARTS]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]


def test_other_lengths_parts_and_tokenizers_are_other_rows(corpus, tokenizer, cache: Path):
    names = {
        pack_rows(corpus, tokenizer, "train", 32, cache=cache).fingerprint,
        pack_rows(corpus, tokenizer, "train", 33, cache=cache).fingerprint,
        pack_rows(corpus, tokenizer, "heldout", 32, cache=cache).fingerprint,
        pack_rows(corpus, tokenizer, "heldout", 32, cache=cache, limit=5).fingerprint,
    }
    assert len(names) == 4
    assert pack_rows(corpus, tokenizer, "train", 32, cache=cache).fingerprint in names


def test_a_limit_bounds_the_rows(corpus, tokenizer, cache: Path):
    packed = pack_rows(corpus, tokenizer, "train", 32, cache=cache, limit=7)
    assert len(packed) == len(packed.keys_N) == len(packed.bytes_N) == 7
    packed.row_id(6)


def test_a_damaged_file_is_packed_again(corpus, tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    before = pack_rows(corpus, tokenizer, "heldout", 32, cache=tmp_path).rows_NT1[:].copy()
    (path,) = (tmp_path / "rows").glob("*/rows.npy")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    after = pack_rows(corpus, tokenizer, "heldout", 32, cache=tmp_path)
    assert np.array_equal(before, after.rows_NT1)
    assert "rows.npy was changed or cut short" in caplog.text


@pytest.mark.parametrize(
    ("part", "mend"),
    [
        ("heldout", "lower data.sequence_length, or raise data.heldout_fraction"),
        ("train", "lower data.sequence_length$"),
    ],
)
def test_too_little_text_for_a_row_says_what_to_change(part, mend: str, corpus, tokenizer, cache: Path):
    with pytest.raises(DataError, match=rf"the {part} part of .* tokens, and one row needs 1000001; .*{mend}"):
        pack_rows(corpus, tokenizer, part, 1_000_000, cache=cache)
