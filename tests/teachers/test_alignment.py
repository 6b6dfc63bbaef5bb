"""Spans of the same bytes: their properties on any two cuts of any text.

pytest tests/teachers/test_alignment.py
"""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from teachers.alignment import ByteRanges, align


def ranges(widths, *, start=0):
    ends = start + np.cumsum(np.array(widths, dtype=np.int64))
    return ByteRanges(ends - np.array(widths, dtype=np.int64), ends)


@st.composite
def cuts(draw, total):
    """Widths that sum to `total`, with empty tokens among them."""
    inner = sorted(draw(st.sets(st.integers(1, total - 1)))) if total > 1 else []
    widths = np.diff([0, *inner, total]).tolist()
    for _ in range(draw(st.integers(0, 3))):
        widths.insert(draw(st.integers(0, len(widths))), 0)
    return widths


@given(st.data(), st.integers(1, 30))
def test_spans_are_the_smallest_pieces_that_both_sequences_cut_out(data, total):
    student, teacher = (ranges(data.draw(cuts(total))) for _ in range(2))
    spans = align(student, teacher)
    pieces = []
    for first, last, their_first, their_last in spans.tolist():
        piece = (int(student.starts_L[first]), int(student.ends_L[last]))
        assert piece == (teacher.starts_L[their_first], teacher.ends_L[their_last])
        for side, edge in ((student, first), (student, last), (teacher, their_first), (teacher, their_last)):
            assert side.ends_L[edge] > side.starts_L[edge], "no empty token at an edge"
        pieces.append(piece)
    common = sorted(set(student.ends_L.tolist()) & set(teacher.ends_L.tolist()) | {0})
    assert pieces == list(itertools.pairwise(common))


def test_two_cuts_of_a_word_meet_at_their_common_boundaries():
    # dis|till|ation against distil|l|ation
    spans = align(ranges([3, 4, 5]), ranges([6, 1, 5]))
    assert spans.tolist() == [[0, 1, 0, 1], [2, 2, 2, 2]]


def test_a_mark_on_one_side_only_is_in_no_span():
    assert align(ranges([0, 2, 2]), ranges([2, 2])).tolist() == [[1, 1, 0, 0], [2, 2, 1, 1]]
    assert align(ranges([2, 2, 0]), ranges([2, 2])).tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]


def test_an_empty_token_inside_a_span_belongs_to_it():
    assert align(ranges([1, 0, 1]), ranges([2])).tolist() == [[0, 2, 0, 0]]


def test_bytes_that_one_side_lacks_are_in_no_span():
    student, head_missing = ranges([1, 2, 2, 3]), ranges([2, 3], start=3)
    assert align(student, head_missing).tolist() == [[2, 2, 0, 0], [3, 3, 1, 1]]
    gap = ByteRanges(np.array([0, 5]), np.array([1, 8]))
    assert align(student, gap).tolist() == [[0, 0, 0, 0], [3, 3, 1, 1]]


def test_a_character_cut_in_the_middle_is_whole_in_its_span():
    # 🦙 is four bytes: two and two against one token that goes on.
    assert align(ranges([2, 2, 1]), ranges([4, 1])).tolist() == [[0, 1, 0, 0], [2, 2, 1, 1]]
    assert align(ranges([2, 2, 1]), ranges([1, 3, 1])).tolist() == [[0, 1, 0, 1], [2, 2, 2, 2]]


def test_nothing_against_something_has_no_spans():
    assert align(ranges([]), ranges([1, 2])).shape == (0, 4)
    assert align(ranges([0, 0]), ranges([1, 2])).shape == (0, 4)
