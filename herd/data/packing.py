"""A part of a corpus as packed rows on disk, made once and memory-mapped by every rank.

rows = pack_rows(corpus, tokenizer, "train", 256, cache=Path(".cache"))
rows.rows_NT1[7], rows.row_id(7)        257 tokens; ("stdlib/json/decoder.py", 1530)
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerFast

from herd.data.cached_folders import build_once
from herd.data.corpora import CACHE, Corpus
from herd.data.encoding import encode_documents
from herd.data.row_cutter import CutRows, RowCutter
from herd.data.splits import Part
from herd.data.tokenizer import tokenizer_digest
from herd.run.errors import DataError

RECIPE = "1"
"""Part of the cache key: raise it when packing or its files change."""

MOST_BYTES_A_TOKEN = 16
"""More than any tokenizer reaches on average; bounds the text read for a limited number of rows."""


@dataclass(frozen=True)
class PackedRows:
    """Rows of T + 1 tokens, overlapping by one, as memory maps.

    rows_NT1: uint32 [N, T + 1]. keys_N: int64 names (`row_cutter.row_key`). bytes_N: int64 bytes of text predicted.
    """

    fingerprint: str
    rows_NT1: np.ndarray
    keys_N: np.ndarray
    bytes_N: np.ndarray
    first_N2: np.ndarray
    documents: list[str]
    left_over_tokens: int

    def __len__(self) -> int:
        return len(self.rows_NT1)

    @property
    def sequence_length(self) -> int:
        """T: the tokens a row feeds the model, and predicts."""
        return self.rows_NT1.shape[1] - 1

    def row_id(self, index: int) -> tuple[str, int]:
        """The document of the row's first token, and that token's offset in it (in tokens, separators counted)."""
        document, offset = self.first_N2[index].tolist()
        return self.documents[document], offset


def pack_rows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    part: Part,
    sequence_length: int,
    *,
    cache: Path = CACHE,
    limit: int | None = None,
) -> PackedRows:
    """Encode, join and cut a part of a corpus; or open what an earlier call with the same text and tokenizer made.

    With a `limit` at most that many rows are made, of documents spread over the part. Tokens at the end that do not
    fill a row are left over. Raises DataError when there is not even one row.
    """
    facts = f"{RECIPE} {corpus.fingerprint} {tokenizer_digest(tokenizer)} {part} {sequence_length} {limit}"
    key = hashlib.sha256(facts.encode()).hexdigest()[:32]

    def build(folder: Path) -> None:
        _pack(folder, corpus, tokenizer, part, sequence_length, limit)

    folder = build_once(cache / "rows" / key, build, what=f"{part} rows")
    return _open(folder, key)


def _pack(
    folder: Path,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    part: Part,
    length: int,
    limit: int | None,
) -> None:
    if limit is None:
        documents = corpus.documents(part)
    else:
        documents = corpus.sample(part, limit * (length + 1) * MOST_BYTES_A_TOKEN)
    cutter = RowCutter(length)
    with (folder / "rows.npy").open("wb") as file:
        writer = RowWriter(file, length)
        for document in encode_documents(documents, tokenizer):
            writer.write(cutter.add(document), limit)
            if writer.count == limit:
                break
        if writer.count == 0:
            share = "" if part == "train" else f", or raise data.{part}_fraction"
            raise DataError(
                f"the {part} part of {corpus.name} has {cutter.kept_tokens} tokens, and one row needs {length + 1}; "
                f"give more text or lower data.sequence_length{share}"
            )
        writer.finish(folder, left_over_tokens=0 if writer.count == limit else cutter.kept_tokens - 1)


class RowWriter:
    """Appends rows to one .npy file without holding them; what names them goes to small files at the end."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.count = 0
        self._length = length
        self._file = file
        self._write_header()
        self._keys: list[np.ndarray] = []
        self._bytes: list[np.ndarray] = []
        self._first: list[tuple[int, int]] = []
        self._documents: dict[str, int] = {}

    def write(self, cut: CutRows, limit: int | None) -> None:
        """Append rows, up to `limit` in all."""
        count = len(cut.rows_NT1) if limit is None else min(len(cut.rows_NT1), limit - self.count)
        self._file.write(cut.rows_NT1[:count].astype("<u4").tobytes())
        self._keys.append(cut.keys_N[:count])
        self._bytes.append(cut.bytes_N[:count])
        for document, offset in zip(cut.documents_N[:count], cut.offsets_N[:count].tolist(), strict=True):
            self._first.append((self._documents.setdefault(document, len(self._documents)), offset))
        self.count += count

    def finish(self, folder: Path, *, left_over_tokens: int) -> None:
        """Write the true length into the header, and the other files."""
        self._write_header()
        np.save(folder / "keys.npy", np.concatenate(self._keys))
        np.save(folder / "bytes.npy", np.concatenate(self._bytes))
        np.save(folder / "first.npy", np.array(self._first, dtype=np.int64))
        facts = {"left_over_tokens": left_over_tokens, "documents": list(self._documents)}
        (folder / "facts.json").write_text(json.dumps(facts))

    def _write_header(self) -> None:
        """numpy pads the header so that the first dimension can grow in place."""
        self._file.seek(0)
        header = {"descr": "<u4", "fortran_order": False, "shape": (self.count, self._length + 1)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _open(folder: Path, key: str) -> PackedRows:
    facts = json.loads((folder / "facts.json").read_text())
    rows_NT1, keys_N, bytes_N, first_N2 = (
        np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("rows", "keys", "bytes", "first")
    )
    return PackedRows(key, rows_NT1, keys_N, bytes_N, first_N2, facts["documents"], facts["left_over_tokens"])
