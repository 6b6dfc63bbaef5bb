"""Rows read again by another tokenizer, for tokenizers of different kinds.

pytest tests/teachers/test_translation.py
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.data.encoding import encode_documents
from herd.data.sources import Document
from herd.data.token_bytes import byte_alphabet, token_bytes
from teachers.alignment import align
from teachers.spans import shared_tokens
from teachers.translation import Translator
from tests.teachers.vocabularies import byte_level, sentencepiece, text

MAKERS = {
    "larger": lambda: byte_level(420, seed=1),
    "other": lambda: byte_level(420, backwards=True),
    "normalising": lambda: byte_level(360, seed=2, nfc=True),
    "one-mark": lambda: byte_level(340, seed=3, begin=None, end="<|endoftext|>"),
    "sentencepiece": lambda: sentencepiece(120, seed=4),
}


@pytest.fixture(scope="module")
def student():
    return byte_level(300)


@pytest.fixture(scope="module", params=list(MAKERS))
def teacher(request):
    return MAKERS[request.param]()


def tokens_of(tokenizer, seeds):
    """The tokens of some documents, joined as packed rows are."""
    documents = [Document(str(seed), text(seed, words=8)) for seed in seeds]
    return np.concatenate([d.tokens_L for d in encode_documents(documents, tokenizer)]).astype(np.int64)


def bytes_between(tokenizer, ids):
    parts = token_bytes(tokenizer)
    return b"".join(parts[id] or b"" for id in ids)


def test_the_byte_alphabet_is_that_of_the_tokenizers_library():
    from tokenizers import pre_tokenizers

    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


@pytest.fixture(scope="module")
def spaced():
    return sentencepiece(120)


@given(words=st.text(max_size=40))
def test_the_bytes_of_a_texts_tokens_are_the_texts_bytes(student, spaced, words):
    assert bytes_between(student, student.encode(words, add_special_tokens=False)) == words.encode()
    if words and "▁" not in words:
        assert bytes_between(spaced, spaced.encode(words, add_special_tokens=False)) == b" " + words.encode()


@given(data=st.data())
def test_every_span_holds_the_same_bytes_on_both_sides_wherever_the_row_is_cut(student, teacher, data):
    ids = tokens_of(student, data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=3)))
    start = data.draw(st.integers(0, len(ids) - 1))
    row = ids[start : data.draw(st.integers(start + 1, len(ids)))]
    translated = Translator(student, teacher, longest=10_000).translate(row[None])[0]
    for first, last, their_first, their_last in align(translated.student, translated.teacher):
        ours = bytes_between(student, row[first : last + 1])
        theirs = bytes_between(teacher, translated.ids[their_first : their_last + 1])
        assert theirs in (ours, b" " + ours)
    # Whole characters of the row are in spans, but for those at its ends.
    covered = align(translated.student, translated.teacher)
    width = translated.student.ends_L[-1] if len(row) else 0
    if width > 8:
        inside = sum(translated.student.ends_L[covered[:, 1]] - translated.student.starts_L[covered[:, 0]])
        assert inside >= width - 8


def test_separators_become_the_teachers_and_rows_of_whole_documents_its_own_encoding(student, teacher):
    ids = tokens_of(student, [1, 2])
    translated = Translator(student, teacher, longest=10_000).translate(ids[None])[0]
    assert translated.ids.tolist() == tokens_of(teacher, [1, 2]).tolist()
    spans = align(translated.student, translated.teacher)
    has_begin = teacher.bos_token != teacher.eos_token
    assert (0 in spans[:, 0]) == has_begin and spans[-1, 1] == len(ids) - 1


def test_a_student_with_one_mark_gives_the_teacher_its_begin_of_text(teacher):
    student = byte_level(300, begin=None)
    ids = tokens_of(student, [1, 2, 3])
    translated = Translator(student, teacher, longest=10_000).translate(ids[None])[0]
    expected = tokens_of(teacher, [1, 2, 3]).tolist()
    begins = expected[:1] if teacher.bos_token != teacher.eos_token else []
    # The row's first token is in the middle of nothing; every later text begins with its mark.
    assert begins + translated.ids.tolist() == expected + begins


def test_a_character_that_the_row_cuts_off_is_left_out(student):
    ids = np.array(student.encode("ab🐘cd", add_special_tokens=False))
    parts = token_bytes(student)
    assert all(len(parts[id]) < 4 for id in ids), "the character is in several tokens"
    inside = next(place for place, id in enumerate(ids) if parts[id].startswith(b"\xf0")) + 1
    teacher = byte_level(420, seed=1)
    translator = Translator(student, teacher, longest=100)
    head, tail = (translator.translate(ids[None, part])[0] for part in (slice(0, inside), slice(inside, None)))
    assert bytes_between(teacher, head.ids) == b"ab" and bytes_between(teacher, tail.ids) == b"cd"
    assert len(align(tail.student, tail.teacher)) > 0


def test_a_row_is_cut_at_the_teachers_longest(student):
    ids = tokens_of(student, [1])
    translated = Translator(student, byte_level(420, seed=1), longest=7).translate(ids[None])[0]
    assert len(translated.ids) == len(translated.teacher) == 7
    spans = align(translated.student, translated.teacher)
    assert len(spans) and spans[:, 3].max() < 7


def test_shared_tokens_are_pairs_of_the_same_bytes_and_of_the_same_role(student, teacher):
    shared = shared_tokens(student, teacher)
    ours, theirs = token_bytes(student), token_bytes(teacher)
    pairs = list(zip(shared.student_M.tolist(), shared.teacher_M.tolist(), strict=True))
    assert (student.eos_token_id, teacher.eos_token_id) in pairs
    assert (student.convert_tokens_to_ids("<other>"), teacher.convert_tokens_to_ids("<other>")) in pairs
    assert ((student.bos_token_id, teacher.bos_token_id) in pairs) == (teacher.bos_token != teacher.eos_token)
    assert all(ours[one] == theirs[other] for one, other in pairs)
    assert len({one for one, _ in pairs}) == len({other for _, other in pairs}) == len(pairs) > 50


def test_a_tokenizer_shares_all_its_tokens_with_itself(student):
    shared = shared_tokens(student, student)
    assert shared.share == 1 and shared.student_M.tolist() == shared.teacher_M.tolist() == list(range(len(student)))
