"""What a corpus is read from: an ordered, re-readable run of documents with a cursor.

A source yields the same documents in the same order every time; a cursor is plain JSON, taken between two documents.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

Cursor = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """One text and its name, which is stable across runs and machines."""

    id: str
    text: str


class Reader(Protocol):
    """An iterator of documents that knows where it is."""

    def __iter__(self) -> Iterator[Document]: ...

    def __next__(self) -> Document: ...

    def cursor(self) -> Cursor:
        """Where the next document begins; `Source.read(cursor)` goes on from there."""
        ...


class Source(Protocol):
    """A run of documents."""

    name: str
    identity: str

    def read(self, cursor: Cursor | None = None) -> Reader:
        """Start at the beginning, or at a cursor of an earlier reader. Raises DataError for what cannot be read."""
        ...


class CountingReader:
    """A reader over documents that are cheap to skip: its cursor is their number."""

    def __init__(self, documents: Iterator[Document], cursor: Cursor | None = None) -> None:
        self._count = 0 if cursor is None else cursor["documents"]
        self._documents = islice(documents, self._count, None)

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        document = next(self._documents)
        self._count += 1
        return document

    def cursor(self) -> Cursor:
        return {"documents": self._count}


class GeneratedSource:
    """A source made of a function that starts a fresh, ordered iterator of documents."""

    def __init__(self, name: str, identity: str, documents: Callable[[], Iterator[Document]]) -> None:
        self.name = name
        self.identity = identity
        self._documents = documents

    def read(self, cursor: Cursor | None = None) -> CountingReader:
        return CountingReader(self._documents(), cursor)


class ChainedReader:
    """Reads several sources, one after the other."""

    def __init__(self, sources: list[Source], cursor: Cursor | None) -> None:
        self._sources = sources
        self._index = 0 if cursor is None else cursor["source"]
        self._reader = sources[self._index].read(None if cursor is None else cursor["inner"])

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        while True:
            try:
                return next(self._reader)
            except StopIteration:
                if self._index + 1 == len(self._sources):
                    raise
                self._index += 1
                self._reader = self._sources[self._index].read()

    def cursor(self) -> Cursor:
        return {"source": self._index, "inner": self._reader.cursor()}


class ChainedSource:
    """Several sources as one."""

    def __init__(self, name: str, sources: list[Source]) -> None:
        self.name = name
        self.identity = "\n".join(source.identity for source in sources)
        self._sources = sources

    def read(self, cursor: Cursor | None = None) -> ChainedReader:
        return ChainedReader(self._sources, cursor)
