"""Spans of the same bytes in two token sequences: the smallest ones that both sequences cut out.

    spans_S4 = align(student, teacher)          # ByteRanges; first and last token of each side, both included

Shapes: L tokens of a sequence, S spans.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ByteRanges:
    """Where the tokens of a sequence lie in the text: token l is the bytes starts_L[l] to ends_L[l], in order.

    A token may be empty (a special token) and may be part of a character; there may be gaps between tokens.
    """

    starts_L: NDArray[np.int64]
    ends_L: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts_L)


def align(student: ByteRanges, teacher: ByteRanges) -> NDArray[np.int64]:
    """[S, 4]: first and last token of the student's side, first and last of the teacher's, for every span.

    A span begins and ends where both sequences have a token boundary and neither has a gap; no span contains another
    such boundary. Empty tokens at its edges are no part of it, empty ones inside are. Bytes that only one sequence has
    are in no span.
    """
    if not len(student) or not len(teacher):
        return np.empty((0, 4), dtype=np.int64)
    common = np.intersect1d(_boundaries(student), _boundaries(teacher))
    begins_S, ends_S = common[:-1], common[1:]
    (first_S, last_S, whole_S), (their_first_S, their_last_S, their_whole_S) = (
        _tokens_between(side, begins_S, ends_S) for side in (student, teacher)
    )
    return np.stack((first_S, last_S, their_first_S, their_last_S), axis=1)[whole_S & their_whole_S]


def _boundaries(side: ByteRanges) -> NDArray[np.int64]:
    return np.union1d(side.starts_L, side.ends_L)


def _tokens_between(
    side: ByteRanges, begins_S: NDArray[np.int64], ends_S: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """First and last token with bytes between each two boundaries, and whether tokens fill all the bytes between."""
    full = np.flatnonzero(side.ends_L > side.starts_L)
    covered = np.concatenate(([0], np.cumsum(side.ends_L[full] - side.starts_L[full])))
    from_S = np.searchsorted(side.starts_L[full], begins_S)
    to_S = np.searchsorted(side.ends_L[full], ends_S, side="right")
    whole_S = covered[to_S] - covered[np.minimum(from_S, to_S)] == ends_S - begins_S
    places = np.append(full, len(side))
    return places[from_S], places[to_S - 1], whole_S
