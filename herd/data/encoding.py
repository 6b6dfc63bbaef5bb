"""Documents to token ids and the bytes of text each token stands for.

    for piece in encode_documents(documents, tokenizer): piece.document_id, piece.tokens_L, piece.bytes_L

Suffix legend: L tokens of one document.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from herd.data.sources import Document
from herd.run.errors import DataError

CHARACTERS_AT_ONCE = 1_000_000


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """A document between its separators: ids (uint32) and bytes of UTF-8 text (uint32) of each token."""

    document_id: str
    tokens_L: np.ndarray
    bytes_L: np.ndarray


def encode_documents(documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[EncodedDocument]:
    """Encode as `<begin> text <end>`, in order.

    The model learns from the pair where a text starts and that it stops. A tokenizer with one token for both (GPT-2)
    gets it at the end only. Special tokens spelt out in a text stay plain text, so that no document can end itself.
    Raises DataError when the tokenizer has neither token.
    """
    encoder = Encoder(tokenizer)
    for batch in _batches(documents):
        yield from encoder.encode(batch)


class Encoder:
    """A private copy of a tokenizer, set to plain text: no special tokens, truncation or padding.

    `before` and `after` are the ids it sets around a text: one or none each.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        if begin is None and end is None:
            raise DataError("the tokenizer has neither a bos_token nor an eos_token to separate documents; set one")
        self.before = [] if begin is None or begin == end else [begin]
        self.after = [] if end is None else [end]
        self._tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._bytes_V = _byte_lengths(tokenizer)

    def encode(self, documents: list[Document]) -> Iterator[EncodedDocument]:
        texts = [document.text for document in documents]
        if self._bytes_V is not None:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        else:
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        for document, encoding in zip(documents, encodings, strict=True):
            ids_L = np.array([*self.before, *encoding.ids, *self.after], dtype=np.uint32)
            bytes_L = np.zeros(len(ids_L), dtype=np.uint32)
            inside = slice(len(self.before), len(ids_L) - len(self.after))
            if self._bytes_V is not None:
                bytes_L[inside] = self._bytes_V[ids_L[inside]]
            else:
                bytes_L[inside] = bytes_by_offsets(document.text, encoding)
            yield EncodedDocument(document.id, ids_L, bytes_L)


def bytes_by_offsets(text: str, encoding: Encoding) -> np.ndarray:
    """Bytes of text each token adds beyond the tokens before it (uint32); they sum to the text's bytes exactly.

    Works for any tokenizer; a character cut into several tokens counts for the first.
    """
    if not encoding.ids:
        return np.zeros(0, dtype=np.uint32)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    reached = np.concatenate(([0], np.cumsum(widths)))
    ends_L = np.maximum.accumulate(np.array(encoding.offsets, dtype=np.int64)[:, 1])
    ends_L[-1] = len(text)  # offsets may leave out trailing space
    return np.diff(reached[ends_L], prepend=0).astype(np.uint32)


def _byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray | None:
    """Bytes of every id of a byte-level tokenizer without normaliser (a token has one character a byte); else None."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    if type(backend.decoder).__name__ != "ByteLevel" or backend.normalizer is not None:
        return None
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.get_vocab()
    bytes_V = np.zeros(max(vocabulary.values()) + 1, dtype=np.uint32)
    for token, id in vocabulary.items():
        bytes_V[id] = len(added[id].encode()) if id in added else len(token)
    return bytes_V


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of about a megabyte: enough to keep every core busy, little enough to hold."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
