"""The token rows a method is calibrated on.

rows = calibration_rows(data, model_folder, rows=128)      # the data's calibration part, or all of a foreign file
rows.tokens_NT, rows.fingerprint
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from herd.data.corpora import CACHE, StoredCorpus, StreamedCorpus, open_corpus
from herd.data.sources import Document
from herd.data.splits import PARTS, Part
from herd.data.streams import fixed_batches
from herd.data.tokenizer import load_tokenizer
from herd.run.errors import DataError
from herd.run.schema import Data

LEAST_TOKENS = 1024
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class CalibrationRows:
    """Whole rows of one length, in the order they were drawn."""

    tokens_NT: Tensor
    source: str = "given rows"

    def __post_init__(self) -> None:
        if self.tokens_NT.ndim != 2 or self.tokens_NT.numel() < LEAST_TOKENS:
            shape = list(self.tokens_NT.shape)
            raise DataError(
                f"calibration data {self.source}: {shape} tokens, at least {LEAST_TOKENS} in rows of one length are "
                "needed; give more text, or more or longer rows"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens."""
        shape = repr(list(self.tokens_NT.shape)).encode()
        return hashlib.sha256(shape + self.tokens_NT.long().numpy().tobytes()).hexdigest()

    def batches(self) -> list[Tensor]:
        """The rows [B, T] that run at one time, int64."""
        return list(self.tokens_NT.long().split(max(1, BATCH_TOKENS // self.tokens_NT.shape[1])))

    def first(self, rows: int) -> "CalibrationRows":
        """The beginning."""
        return CalibrationRows(self.tokens_NT[:rows], self.source)


def calibration_rows(
    data: Data, model_folder: str | Path, *, rows: int, whole: bool = False, cache: Path = CACHE
) -> CalibrationRows:
    """At most `rows` rows of data.sequence_length tokens, by the model's own tokenizer, spread over the documents.

    They come from the calibration part, which neither training nor evaluation reads; with `whole`, for data that
    serves calibration alone, from all of it. DataError when there is too little text.
    """
    corpus = open_corpus(data, cache=cache)
    batches = fixed_batches(
        data,
        load_tokenizer(model_folder),
        "calibration",
        rows=rows,
        corpus=_Whole(corpus) if whole else corpus,
        cache=cache,
    )
    return CalibrationRows(torch.cat([batch.input_ids_BT for batch in batches]), data.source)


class _Whole:
    """A corpus all of whose documents are for calibration."""

    def __init__(self, corpus: StoredCorpus | StreamedCorpus):
        self._corpus = corpus
        self.name = corpus.name
        self.fingerprint = hashlib.sha256(f"whole {corpus.fingerprint}".encode()).hexdigest()

    def documents(self, part: Part) -> Iterator[Document]:
        for each in PARTS:
            yield from self._corpus.documents(each)

    def sample(self, part: Part, max_bytes: int) -> Iterator[Document]:
        left = max_bytes
        for each in PARTS:
            for document in self._corpus.sample(each, left) if left > 0 else ():
                left -= len(document.text.encode("utf-8", "surrogatepass"))
                yield document

    def describe(self) -> str:
        return f"{self.name}: all of it for calibration"
