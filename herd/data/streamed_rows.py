"""Rows packed on the way from a streamed corpus, in the same order at any world size, resumable to the row.

Rows come in blocks of 512, shuffled inside a block. Every rank reads and packs the whole stream and keeps its share:
that costs tokenising once a rank, and makes the order independent of the ranks. A saved position is the place where
the current block begins, so nothing of the text itself is stored.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from herd.data.batches import Batch, check_same_rows, make_batch, places_of_rank
from herd.data.corpora import StreamedCorpus
from herd.data.encoding import Encoder
from herd.data.mixed_rows import Columns
from herd.data.permutation import shuffled
from herd.data.row_cutter import CutRows, CutterState, RowCutter
from herd.data.sources import Cursor, Document
from herd.data.splits import Part
from herd.data.tokenizer import tokenizer_digest
from herd.run.errors import DataError

BLOCK_ROWS = 512
CHARACTERS_AT_ONCE = 200_000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the endless run of rows: before a document (by cursor), less the rows of it already used."""

    epoch: int
    cursor: Cursor | None
    cutter: CutterState
    used: int


START = Place(epoch=0, cursor=None, cutter=CutterState.empty(), used=0)


@dataclass(frozen=True, slots=True)
class Block:
    """512 rows in reading order: uint32 [R, T + 1], int64 keys and bytes, and where they begin and end."""

    number: int
    start: Place
    end_epoch: int
    rows_RT1: np.ndarray
    keys_R: np.ndarray
    bytes_R: np.ndarray


class RowReader:
    """Walks the documents from a place on, for ever, and hands out rows in blocks."""

    def __init__(
        self,
        corpus: StreamedCorpus,
        part: Part,
        encoder: Encoder,
        sequence_length: int,
        *,
        start: Place,
        number: int,
    ) -> None:
        self._corpus, self._part, self._encoder, self._length = corpus, part, encoder, sequence_length
        self._number = number
        self._cuts = self._walk(start)
        self._place, self._cut = next(self._cuts)
        self._used = start.used

    def next_block(self) -> Block:
        """Read on until a block is full. Raises DataError when the part has no documents."""
        start = Place(self._place.epoch, self._place.cursor, self._place.cutter, self._used)
        slices: list[tuple[CutRows, slice]] = []
        missing = BLOCK_ROWS
        while missing:
            if self._used == len(self._cut.rows_NT1):
                self._place, self._cut = next(self._cuts)
                self._used = 0
            taken = slice(self._used, min(self._used + missing, len(self._cut.rows_NT1)))
            slices.append((self._cut, taken))
            missing -= taken.stop - taken.start
            self._used = taken.stop
        self._number += 1
        return Block(
            number=self._number - 1,
            start=start,
            end_epoch=self._place.epoch,
            rows_RT1=np.concatenate([cut.rows_NT1[taken] for cut, taken in slices]),
            keys_R=np.concatenate([cut.keys_N[taken] for cut, taken in slices]),
            bytes_R=np.concatenate([cut.bytes_N[taken] for cut, taken in slices]),
        )

    def _walk(self, start: Place) -> Iterator[tuple[Place, CutRows]]:
        cutter = RowCutter(self._length)
        cutter.restore(start.cutter)
        for places, documents in self._batches(start):
            for (epoch, cursor), encoded in zip(places, self._encoder.encode(documents), strict=True):
                place = Place(epoch, cursor, cutter.state(), 0)
                yield place, cutter.add(encoded)

    def _batches(self, start: Place) -> Iterator[tuple[list[tuple[int, Cursor | None]], list[Document]]]:
        """Documents with the places before them, a few at a time so that they are encoded on every core."""
        epoch, cursor = start.epoch, start.cursor
        while True:
            reader = self._corpus.read(self._part, cursor)
            places: list[tuple[int, Cursor | None]] = []
            documents: list[Document] = []
            characters = 0
            found = cursor is not None
            cursor = reader.cursor()
            for document in reader:
                found = True
                places.append((epoch, cursor))
                documents.append(document)
                characters += len(document.text)
                cursor = reader.cursor()
                if characters >= CHARACTERS_AT_ONCE:
                    yield places, documents
                    places, documents, characters = [], [], 0
            if documents:
                yield places, documents
            if not found:
                raise DataError(f"the {self._part} part of {self._corpus.name} has no text; name another source")
            epoch, cursor = epoch + 1, None


class StreamedRows:
    """A RowSource over a streamed corpus."""

    def __init__(
        self,
        corpus: StreamedCorpus,
        tokenizer: PreTrainedTokenizerFast,
        part: Part,
        sequence_length: int,
        *,
        seed: int,
    ) -> None:
        self._corpus, self._part, self._length, self._seed = corpus, part, sequence_length, seed
        self._encoder = Encoder(tokenizer)
        facts = f"{corpus.fingerprint} {tokenizer_digest(tokenizer)} {part} {sequence_length}"
        self._fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:32]
        self._told = False
        self._go_to(START, number=0)

    def take(self, step: int, *, rows: int, micro_rows: int, rank: int, world: int) -> list[Batch]:
        """See `RowSource.take`. Steps in order are cheap; going back reads the stream again from its start."""
        rows_RT1, keys_R, bytes_R = self.read(np.arange(step * rows, (step + 1) * rows), np.arange(rows))
        if rank == 0:
            self.tell_wrap(step, (step + 1) * rows - 1)
        chosen = places_of_rank(rows, micro_rows=micro_rows, rank=rank, world=world)
        return [make_batch(rows_RT1[places_B], keys_R[places_B], bytes_R[places_B]) for places_B in chosen]

    def read(self, places: np.ndarray, kept: np.ndarray) -> Columns:
        """See `Stream.read`. All places are walked over, so that every rank stands at the same one."""
        parts = [
            self._rows(int(number), places[places // BLOCK_ROWS == number])
            for number in np.unique(places // BLOCK_ROWS)
        ]
        rows_RT1, keys_R, bytes_R = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return rows_RT1[kept], keys_R[kept], bytes_R[kept]

    def _rows(self, number: int, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if number < self._block.number:
            self._go_to(START, number=0)
        while self._block.number < number:
            self._block = self._reader.next_block()
        order = shuffled(wanted % BLOCK_ROWS, count=BLOCK_ROWS, key=(self._seed, number))
        return self._block.rows_RT1[order], self._block.keys_R[order], self._block.bytes_R[order]

    def _go_to(self, start: Place, *, number: int) -> None:
        self._reader = RowReader(self._corpus, self._part, self._encoder, self._length, start=start, number=number)
        self._block = self._reader.next_block()

    def tell_wrap(self, step: int, last: int, of: str = "") -> None:
        """See `Stream.tell_wrap`."""
        if self._block.end_epoch > 0 and not self._told:
            self._told = True
            log.warning(
                "step %d: the streamed text%s has been read to its end; epoch %d begins at its start again",
                step,
                of,
                self._block.end_epoch + 1,
            )

    def state_dict(self) -> dict[str, Any]:
        """See `RowSource.state_dict`."""
        start = self._block.start
        return {
            "rows": self._fingerprint,
            "seed": self._seed,
            "block": self._block.number,
            "epoch": start.epoch,
            "cursor": start.cursor,
            "cutter": start.cutter.plain(),
            "used": start.used,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `RowSource.load_state_dict`."""
        check_same_rows(state, self.state_dict())
        cutter = CutterState.from_plain(state["cutter"])
        self._go_to(Place(state["epoch"], state["cursor"], cutter, state["used"]), number=state["block"])
