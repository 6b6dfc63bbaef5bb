"""Parts are disjoint, complete, stable and blind to order."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.data.splits import PARTS, part_of, split_all, text_digest
from herd.run.errors import DataError
from herd.run.schema import Data

DATA = Data(heldout_fraction=0.1, calibration_fraction=0.05)
texts = st.lists(st.text(min_size=1), min_size=3, max_size=60, unique=True)


def digests(texts: list[str]) -> np.ndarray:
    return np.frombuffer(b"".join(map(text_digest, texts)), dtype=np.uint8).reshape(-1, 16)


@given(texts, st.randoms())
def test_a_texts_part_does_not_depend_on_the_order_of_the_corpus(texts, random):
    before = dict(zip(texts, split_all(digests(texts), DATA, "x").tolist(), strict=True))
    random.shuffle(texts)
    assert dict(zip(texts, split_all(digests(texts), DATA, "x").tolist(), strict=True)) == before


@given(texts)
def test_no_part_is_empty(texts):
    assert set(split_all(digests(texts), DATA, "x").tolist()) == {0, 1, 2}


def test_a_corpus_of_some_size_splits_every_text_as_it_would_alone():
    texts = [f"text {number}" for number in range(2000)]
    parts = [PARTS[code] for code in split_all(digests(texts), DATA, "x")]
    assert parts == [part_of(text_digest(text), DATA) for text in texts]
    assert parts.count("heldout") == pytest.approx(200, abs=45)
    assert parts.count("calibration") == pytest.approx(100, abs=35)


def test_the_split_is_a_plain_function_of_sha256():
    text = "stable for ever"
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    just_above = Data(heldout_fraction=place + 1e-6, calibration_fraction=0.01)
    just_below = Data(heldout_fraction=place - 1e-6, calibration_fraction=0.01)
    assert 0.0 < place < 0.5
    assert part_of(text_digest(text), just_above) == "heldout"
    assert part_of(text_digest(text), just_below) == "calibration"


def test_two_texts_cannot_be_split_in_three():
    with pytest.raises(DataError, match=r"tiny\.txt holds 2 distinct"):
        split_all(digests(["a", "b"]), DATA, "tiny.txt")
