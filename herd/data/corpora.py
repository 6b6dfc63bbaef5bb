"""A corpus: documents in three disjoint parts, with a fingerprint.

corpus = open_corpus(config.data)
for document in corpus.documents("train"): ...
"""

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from herd.data.sources import ChainedSource, Cursor, Document, Reader, Source
from herd.data.splits import LEFT_OUT, PARTS, Part, part_of, split_all, text_digest
from herd.data.stdlib_corpus import stdlib_source
from herd.data.tables import TABLE_FORMATS, file_table, hub_table
from herd.data.text_files import TEXT_SUFFIXES, text_source
from herd.run import hub
from herd.run.errors import DataError
from herd.run.schema import Data

CACHE = Path(".cache")


class Corpus(Protocol):
    """Documents in three disjoint parts, always in the same order."""

    name: str
    fingerprint: str

    def documents(self, part: Part) -> Iterator[Document]:
        """All documents of a part; empty texts and repeated ones are left out."""
        ...

    def sample(self, part: Part, max_bytes: int) -> Iterator[Document]:
        """Documents of a part that hold `max_bytes` or just over, or all of it: always the same ones, at least one."""
        ...

    def describe(self) -> str:
        """One line for people."""
        ...


class StoredCorpus:
    """A corpus whose documents were all seen once: exact parts, duplicates left out, digest of the contents."""

    def __init__(self, source: Source, data: Data) -> None:
        self.name = source.name
        self._source = source
        ids, digests, sizes = hashlib.sha256(), bytearray(), []
        for document in source.read():
            ids.update(document.id.encode() + b"\0")
            digests += text_digest(document.text)
            sizes.append(len(document.text.encode("utf-8", "surrogatepass")) if document.text.strip() else 0)
        self._digests_N = np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, 16)
        self._bytes_N = np.array(sizes, dtype=np.int64)
        self._parts_N = self._split(data)
        shares = f"{data.heldout_fraction!r} {data.calibration_fraction!r}"
        facts = source.identity.encode() + b"\0" + shares.encode() + ids.digest() + bytes(digests)
        self.fingerprint = hashlib.sha256(facts).hexdigest()

    def _split(self, data: Data) -> np.ndarray:
        parts_N = np.full(len(self._bytes_N), LEFT_OUT, dtype=np.uint8)
        (filled_M,) = np.nonzero(self._bytes_N)
        _, first_K = np.unique(self._digests_N[filled_M], axis=0, return_index=True)
        kept_K = filled_M[np.sort(first_K)]
        parts_N[kept_K] = split_all(self._digests_N[kept_K], data, self.name)
        return parts_N

    def documents(self, part: Part) -> Iterator[Document]:
        code = PARTS.index(part)
        return (document for document, of in zip(self._source.read(), self._parts_N, strict=True) if of == code)

    def sample(self, part: Part, max_bytes: int) -> Iterator[Document]:
        (of_part_M,) = np.nonzero(self._parts_N == PARTS.index(part))
        # The half of the digest that did not decide the part decides who comes first.
        order_M = of_part_M[np.argsort(self._digests_N[of_part_M, 8:].copy().view(">u8")[:, 0], kind="stable")]
        enough = int(np.searchsorted(np.cumsum(self._bytes_N[order_M]), max_bytes)) + 1
        chosen_N = np.zeros(len(self._parts_N), dtype=bool)
        chosen_N[order_M[:enough]] = True
        return (document for document, chosen in zip(self._source.read(), chosen_N, strict=True) if chosen)

    def describe(self) -> str:
        counts = ", ".join(f"{part} {int((self._parts_N == code).sum())}" for code, part in enumerate(PARTS))
        megabytes = self._bytes_N[self._parts_N != LEFT_OUT].sum() / 1e6
        left_out = int((self._parts_N == LEFT_OUT).sum())
        return f"{self.name}: {megabytes:.1f} MB, documents: {counts}; {left_out} empty or repeated left out"


class StreamedCorpus:
    """A corpus read as it comes: each text's part is decided alone, repeats inside a part are kept.

    Its fingerprint names the source (hub commit; names and sizes of files), as the contents are not known beforehand.
    """

    def __init__(self, source: Source, data: Data) -> None:
        self.name = source.name
        self._source = source
        self._data = data
        facts = f"streamed\n{source.identity}\n{data.heldout_fraction!r} {data.calibration_fraction!r}"
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()

    def documents(self, part: Part) -> Iterator[Document]:
        return self.read(part)

    def read(self, part: Part, cursor: Cursor | None = None) -> "PartReader":
        """The documents of a part from a cursor on; the reader's own `.cursor()` makes such cursors."""
        return PartReader(self._source.read(cursor), part, self._data)

    def sample(self, part: Part, max_bytes: int) -> Iterator[Document]:
        left = max_bytes
        for document in self.read(part):
            yield document
            left -= len(document.text.encode("utf-8", "surrogatepass"))
            if left <= 0:
                return

    def describe(self) -> str:
        shares = f"held out {self._data.heldout_fraction:.1%}, calibration {self._data.calibration_fraction:.1%}"
        return f"{self.name}: streamed; {shares} of the documents"


class PartReader:
    """A reader that passes on the documents of one part."""

    def __init__(self, reader: Reader, part: Part, data: Data) -> None:
        self._reader, self._part, self._data = reader, part, data

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        for document in self._reader:
            if document.text.strip() and part_of(text_digest(document.text), self._data) == self._part:
                return document
        raise StopIteration

    def cursor(self) -> Cursor:
        return self._reader.cursor()


class MixedCorpus:
    """Several named corpora, each of which keeps its documents, its parts and its fingerprint."""

    def __init__(self, corpora: dict[str, StoredCorpus | StreamedCorpus], weights: dict[str, float]) -> None:
        self.corpora, self.weights = corpora, weights
        self.name = ", ".join(corpora)
        facts = "\n".join(f"{name} {weights[name]!r} {corpus.fingerprint}" for name, corpus in corpora.items())
        self.fingerprint = hashlib.sha256(f"mixed\n{facts}".encode()).hexdigest()

    def documents(self, part: Part) -> Iterator[Document]:
        for name, corpus in self.corpora.items():
            yield from (replace(document, id=f"{name}/{document.id}") for document in corpus.documents(part))

    def sample(self, part: Part, max_bytes: int) -> Iterator[Document]:
        """See `Corpus.sample`: of every source, by weight."""
        total = sum(self.weights.values())
        for name, corpus in self.corpora.items():
            for document in corpus.sample(part, int(max_bytes * self.weights[name] / total)):
                yield replace(document, id=f"{name}/{document.id}")

    def describe(self) -> str:
        return "; ".join(f"{name} = {corpus.describe()}" for name, corpus in self.corpora.items())


AnyCorpus = StoredCorpus | StreamedCorpus | MixedCorpus


def open_corpus(data: Data, *, cache: Path = CACHE) -> AnyCorpus:
    """Open `data.source`: `stdlib`, a text, jsonl, json or parquet file, a folder of them, or a hub dataset id.

    With `data.sources` all of those. Raises DataError, in one line, for what is missing, empty, unreadable, or lacks
    the text field.
    """
    if data.sources:
        weights = {name: source.weight for name, source in data.sources.items()}
        corpora = {}
        for name in data.sources:
            with _naming(name):
                corpora[name] = _open_one(data.alone(name), cache)
        return MixedCorpus(corpora, weights)
    return _open_one(data, cache)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the source's name in front of an error's line."""
    try:
        yield
    except DataError as error:
        raise DataError(f"data.sources.{name}: {error}") from error


def _open_one(data: Data, cache: Path) -> StoredCorpus | StreamedCorpus:
    source = _open_source(data, cache)
    return StreamedCorpus(source, data) if data.streaming else StoredCorpus(source, data)


def check_source(data: Data) -> None:
    """Raise DataError when a source is neither on this machine nor can be a hub id. Nothing of it is read."""
    if data.sources:
        for name in data.sources:
            with _naming(name):
                check_source(data.alone(name))
        return
    path = Path(data.source).expanduser().resolve()
    if data.source != "stdlib" and not path.exists() and not hub.is_id(data.source):
        raise DataError(f"data.source = {data.source}: {_absent(path)}")


def _open_source(data: Data, cache: Path) -> Source:
    check_source(data)
    path = Path(data.source).expanduser().resolve()
    if data.source == "stdlib":
        return stdlib_source()
    if path.exists():
        return _file_source(path, data, storage=cache / "datasets")
    return hub_table(data, hint=f"; on this machine: {_absent(path)}")


def _absent(path: Path) -> str:
    return f"no such file or folder{nearest_names(path)}"


def _file_source(path: Path, data: Data, *, storage: Path) -> Source:
    """The files of a path by format: text first, then tables, each in the order of their names."""
    files = [path] if path.is_file() else _walk(path)
    known = [file for file in files if file.suffix in TEXT_SUFFIXES or file.suffix in TABLE_FORMATS]
    allowed = ", ".join((*TEXT_SUFFIXES, *TABLE_FORMATS))
    if not known:
        there = ", ".join(sorted({file.suffix or "no suffix" for file in files})) or "nothing"
        raise DataError(f"data.source = {data.source}: no file that can be read (there is {there}); allowed: {allowed}")
    filled = [file for file in known if file.stat().st_size > 0]
    if not filled:
        raise DataError(f"data.source = {data.source} is empty (0 bytes); give it text, or name another source")
    sources: list[Source] = []
    texts = [file for file in filled if file.suffix in TEXT_SUFFIXES]
    if texts:
        sources.append(text_source(texts, root=path))
    for loader in sorted(set(TABLE_FORMATS.values())):
        tables = [file for file in filled if TABLE_FORMATS.get(file.suffix) == loader]
        if tables:
            sources.append(file_table(loader, tables, data, root=path, storage=storage))
    return sources[0] if len(sources) == 1 else ChainedSource(path.name, sources)


def _walk(folder: Path) -> list[Path]:
    """Files below a folder, without hidden ones and Python's caches."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [
        path
        for path in files
        if not any(name.startswith(".") or name == "__pycache__" for name in path.relative_to(folder).parts)
    ]


def nearest_names(path: Path) -> str:
    """` (nearest: 'a', 'b')` for a path that does not exist: the names like it beside it; empty when there are none."""
    parent = path.parent
    if not parent.is_dir():
        return f" (nor a folder {parent})"
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=3, cutoff=0.5)
    return f" (nearest: {', '.join(repr(str(parent / name)) for name in near)})" if near else ""
