"""Cuts a run of encoded documents into rows of T + 1 tokens that overlap by one.

Row n holds tokens nT .. nT + T of the run, so its T predictions are of tokens nT + 1 .. nT + T: every token of the
run but the very first is predicted exactly once. Suffix legend: N rows, T predictions a row, L tokens.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from herd.data.encoding import EncodedDocument


@dataclass(frozen=True, slots=True)
class CutRows:
    """Rows and their names.

    rows_NT1: uint32 tokens [N, T + 1]. bytes_N: int64 bytes of text among the T predicted tokens.
    documents_N, offsets_N: where the first token comes from. keys_N: int64, see `row_key`.
    """

    rows_NT1: np.ndarray
    bytes_N: np.ndarray
    documents_N: list[str]
    offsets_N: np.ndarray
    keys_N: np.ndarray


@dataclass(frozen=True, slots=True)
class CutterState:
    """Tokens (uint32) kept back for the next row, their bytes, and the documents that begin among them.

    A mark is (place among the kept tokens, document id, offset of that place in the document).
    """

    tokens_L: np.ndarray
    bytes_L: np.ndarray
    marks: list[tuple[int, str, int]]

    @staticmethod
    def empty() -> "CutterState":
        return CutterState(np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.uint32), [])

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> "CutterState":
        """The inverse of `plain`."""
        tokens_L, bytes_L = (np.array(plain[name], dtype=np.uint32) for name in ("tokens", "bytes"))
        return CutterState(tokens_L, bytes_L, [(place, name, offset) for place, name, offset in plain["marks"]])

    def plain(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"tokens": self.tokens_L.tolist(), "bytes": self.bytes_L.tolist(), "marks": [*map(list, self.marks)]}


class RowCutter:
    """Takes documents one by one, gives the rows they complete, and keeps the rest for the next document."""

    def __init__(self, sequence_length: int) -> None:
        self._length = sequence_length
        self.restore(CutterState.empty())

    @property
    def kept_tokens(self) -> int:
        """Tokens kept back, at most T: fewer than a row needs."""
        return len(self._tokens_L)

    def add(self, document: EncodedDocument) -> CutRows:
        """Append a document; return the rows that are now complete (perhaps none)."""
        length = self._length
        marks = [*self._marks, (len(self._tokens_L), document.document_id, 0)]
        tokens_L = np.concatenate((self._tokens_L, document.tokens_L))
        bytes_L = np.concatenate((self._bytes_L, document.bytes_L))
        count = max(0, (len(tokens_L) - 1) // length)

        places = np.array([place for place, _, _ in marks])
        starts_N = np.arange(count) * length
        mark_N = np.searchsorted(places, starts_N, side="right") - 1
        documents_N = [marks[mark][1] for mark in mark_N]
        offsets_N = np.array([marks[mark][2] for mark in mark_N], dtype=np.int64) + starts_N - places[mark_N]
        rows_NT1 = np.lib.stride_tricks.sliding_window_view(tokens_L, length + 1)[::length] if count else None
        rows_NT1 = np.zeros((0, length + 1), dtype=np.uint32) if rows_NT1 is None else rows_NT1.copy()
        bytes_N = bytes_L[1 : count * length + 1].reshape(count, length).sum(axis=1, dtype=np.int64)
        keys = [row_key(*named) for named in zip(rows_NT1, documents_N, offsets_N.tolist(), strict=True)]

        self._keep(tokens_L, bytes_L, marks, count * length)
        return CutRows(rows_NT1, bytes_N, documents_N, offsets_N, np.array(keys, dtype=np.int64))

    def _keep(self, tokens_L: np.ndarray, bytes_L: np.ndarray, marks: list[tuple[int, str, int]], cut: int) -> None:
        self._tokens_L, self._bytes_L = tokens_L[cut:], bytes_L[cut:]
        last = max(number for number, mark in enumerate(marks) if mark[0] <= cut)
        place, document_id, offset = marks[last]
        later = [(at - cut, name, begin) for at, name, begin in marks[last + 1 :]]
        self._marks = [(0, document_id, offset + cut - place), *later]

    def state(self) -> CutterState:
        """What is kept back: nothing is copied, and later documents do not change it."""
        return CutterState(self._tokens_L, self._bytes_L, self._marks)

    def restore(self, state: CutterState) -> None:
        """Go on from another cutter's `state`."""
        self._tokens_L, self._bytes_L, self._marks = state.tokens_L, state.bytes_L, state.marks


def row_key(row_T1: np.ndarray, document_id: str, offset: int) -> int:
    """64 signed bits that name a row by its tokens and its place: a cached target under it can never be another row's.

    BLAKE2b; among a hundred million rows two share a key with a chance of 3 in 10 000.
    """
    facts = row_T1.astype("<u4").tobytes() + document_id.encode() + b"\0" + offset.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(facts, digest_size=8).digest(), "little", signed=True)
