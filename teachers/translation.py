"""Rows of one tokenizer read again by another: the same text, its tokens, and the bytes they stand for.

    translator = Translator(student_tokenizer, teacher_tokenizer, longest=8192)
    translated = translator.translate(input_ids_BT)        # one Translated a row

A row may begin and end inside a document, a word, even a character; special tokens stay what they are.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from herd.data.encoding import EncodedDocument, Encoder
from herd.data.sources import Document
from herd.data.token_bytes import token_bytes
from teachers.alignment import ByteRanges


@dataclass(frozen=True)
class Translated:
    """A row for the teacher, and where both sides' tokens lie in the row's bytes.

    A special token that both have counts as one byte, one that only one of them has as none.
    """

    ids: NDArray[np.int64]
    teacher: ByteRanges
    student: ByteRanges


@dataclass(frozen=True)
class _Run:
    """Neighbouring tokens of text, or one special token, of a student's row."""

    ids: list[int]
    widths: list[int] | None
    """Bytes of each; None for a special token."""
    skipped: int = 0
    """Bytes of a first character whose beginning is missing."""
    text: str = ""
    """The whole characters after them."""


@dataclass
class _Side:
    """Tokens of one side as they are laid out."""

    ids: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    def add(self, ids: list[int], widths: list[int], at: int) -> None:
        self.ids += ids
        self.widths += widths
        self.ends += (at + np.cumsum(widths)).tolist()

    def ranges(self, limit: int | None = None) -> ByteRanges:
        ends_L = np.array(self.ends[:limit], dtype=np.int64)
        return ByteRanges(ends_L - np.array(self.widths[:limit], dtype=np.int64), ends_L)


class Translator:
    """From a student's rows to a teacher's of at most `longest` tokens.

    Raises DataError when the bytes of one of them cannot be told, or one marks neither begin nor end of a text.
    """

    def __init__(self, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, *, longest: int) -> None:
        self._bytes, self._their_bytes = token_bytes(student), token_bytes(teacher)
        self._encoder, ours = Encoder(teacher), Encoder(student)
        self._longest = longest
        theirs = {token.content: id for id, token in teacher.added_tokens_decoder.items() if token.special}
        mirrored = {id: theirs.get(token.content) for id, token in student.added_tokens_decoder.items()}
        self._mirror = {id: [] if other is None else [other] for id, other in mirrored.items()}
        self._mirror |= dict.fromkeys(ours.before, self._encoder.before) | dict.fromkeys(
            ours.after, self._encoder.after
        )
        # A student that marks only where a text ends: the teacher still gets its mark where the next one begins.
        self._begin_after = None if ours.before else ours.after

    def translate(self, input_ids_BT: NDArray[np.int64]) -> list[Translated]:
        """Every row as the teacher reads it."""
        rows = [list(self._runs(row.tolist())) for row in input_ids_BT]
        texts = [Document("", run.text) for runs in rows for run in runs if run.text]
        encoded = self._encoder.encode(texts) if texts else iter(())
        return [self._lay_out(runs, encoded) for runs in rows]

    def _runs(self, row: list[int]) -> Iterator[_Run]:
        ids: list[int] = []
        parts: list[bytes] = []
        for id in [*row, None]:
            text = self._bytes[id] if id is not None and id < len(self._bytes) else None
            if text is not None:
                ids.append(id)
                parts.append(text)
                continue
            if ids:
                yield _Run(ids, [len(part) for part in parts], *_whole_characters(b"".join(parts)))
                ids, parts = [], []
            if id is not None:
                yield _Run([id], None)

    def _lay_out(self, runs: list[_Run], encoded: Iterator[EncodedDocument]) -> Translated:
        student, teacher, at = _Side(), _Side(), 0
        for run in runs:
            if run.widths is None:
                mirrored = self._mirror.get(run.ids[0], [])
                width = len(mirrored)
                student.add(run.ids, [width], at)
                teacher.add(mirrored, [1] * width, at)
                at += width
                if run.ids == self._begin_after:
                    teacher.add(self._encoder.before, [0] * len(self._encoder.before), at)
            else:
                student.add(run.ids, run.widths, at)
                if run.text:
                    teacher.add(*self._read(run.text, next(encoded)), at + run.skipped)
                at += sum(run.widths)
        return Translated(np.array(teacher.ids[: self._longest]), teacher.ranges(self._longest), student.ranges())

    def _read(self, text: str, document: EncodedDocument) -> tuple[list[int], list[int]]:
        """The teacher's ids of a text and their bytes: as its vocabulary says, if that is what the text holds.

        SentencePiece sets a space before a text. A normaliser may change it; then a character is its first token's.
        """
        inside = slice(len(self._encoder.before), len(document.tokens_L) - len(self._encoder.after))
        ids = document.tokens_L[inside].tolist()
        parts = [self._their_bytes[id] or b"" for id in ids]
        widths, joined, data = [len(part) for part in parts], b"".join(parts), text.encode()
        if joined == b" " + data:
            return ids, [widths[0] - 1, *widths[1:]]
        return ids, widths if joined == data else document.bytes_L[inside].tolist()


def _whole_characters(data: bytes) -> tuple[int, str]:
    """Bytes of a first character whose beginning is missing, and the text up to a last character cut short.

    No text when the bytes between are not UTF-8: tokens that no text gave.
    """
    skipped = next((place for place, byte in enumerate(data) if byte & 0xC0 != 0x80), len(data))
    try:
        return skipped, codecs.getincrementaldecoder("utf-8")().decode(data[skipped:])
    except UnicodeDecodeError:
        return skipped, ""
