"""Rows in training order, and fixed rows for evaluation and calibration.

source = open_rows(config, tokenizer, "train")
batches = source.take(step, rows=8, micro_rows=2, rank=0, world=2)
heldout = fixed_batches(config.data, tokenizer, "heldout", rows=config.data.heldout_rows)
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from herd.data.batches import Batch, RowSource, check_same_rows, make_batch, places_of_rank
from herd.data.corpora import CACHE, AnyCorpus, MixedCorpus, StoredCorpus, StreamedCorpus, open_corpus
from herd.data.mixed_rows import Columns, MixedRows
from herd.data.mixture import Mixture
from herd.data.packing import PackedRows, pack_rows
from herd.data.permutation import shuffled
from herd.data.splits import Part
from herd.data.streamed_rows import StreamedRows
from herd.run.schema import Config, Data

FIXED_ROWS_PACKED = 4096
"""Rows that fixed ones are chosen among: enough for any evaluation, little to pack however large the corpus."""

log = logging.getLogger(__name__)


class RowStream:
    """Packed rows in an order that is new in every epoch; the step number is the whole position."""

    def __init__(self, packed: PackedRows, *, seed: int) -> None:
        self._packed = packed
        self._seed = seed
        self._told = False

    def rows_of_step(self, step: int, rows: int) -> np.ndarray:
        """Indices (int64) of the rows of a step, over all ranks; none comes twice in an epoch."""
        return self._indices(np.arange(step * rows, (step + 1) * rows))

    def _indices(self, places: np.ndarray) -> np.ndarray:
        count = len(self._packed)
        indices = np.empty(len(places), dtype=np.int64)
        for epoch in np.unique(places // count).tolist():
            inside = places // count == epoch
            indices[inside] = shuffled(places[inside] % count, count=count, key=(self._seed, epoch))
        return indices

    def read(self, places: np.ndarray, kept: np.ndarray) -> Columns:
        """See `Stream.read`."""
        indices = self._indices(places[kept])
        return self._packed.rows_NT1[indices], self._packed.keys_N[indices], self._packed.bytes_N[indices]

    def take(self, step: int, *, rows: int, micro_rows: int, rank: int, world: int) -> list[Batch]:
        """See `RowSource.take`."""
        indices = self.rows_of_step(step, rows)
        if rank == 0:
            self.tell_wrap(step, (step + 1) * rows - 1)
        chosen = [indices[places] for places in places_of_rank(rows, micro_rows=micro_rows, rank=rank, world=world)]
        return [batch_of(self._packed, indices_B) for indices_B in chosen]

    def tell_wrap(self, step: int, last: int, of: str = "") -> None:
        """See `Stream.tell_wrap`."""
        count = len(self._packed)
        epoch = last // count
        if epoch > 0 and not self._told:
            self._told = True
            log.warning(
                "step %d: all %d training rows%s have been read; epoch %d goes through them in another order",
                step,
                count,
                of,
                epoch + 1,
            )

    def state_dict(self) -> dict[str, Any]:
        """See `RowSource.state_dict`; only what the order depends on."""
        return {"rows": self._packed.fingerprint, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `RowSource.load_state_dict`."""
        check_same_rows(state, self.state_dict())


def batch_of(packed: PackedRows, indices_B: np.ndarray) -> Batch:
    """A batch of these packed rows, in this order."""
    return make_batch(packed.rows_NT1[indices_B], packed.keys_N[indices_B], packed.bytes_N[indices_B])


def open_rows(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    part: Part,
    *,
    corpus: AnyCorpus | None = None,
    cache: Path = CACHE,
) -> RowSource:
    """The rows of a part in training order, packed on disk or, with data.streaming, as they come.

    `corpus` saves opening it again. Raises DataError when the part has too little text for one row.
    """
    corpus = open_corpus(config.data, cache=cache) if corpus is None else corpus
    length, seed = config.data.sequence_length, config.run.seed

    def stream(corpus: StoredCorpus | StreamedCorpus) -> RowStream | StreamedRows:
        if isinstance(corpus, StreamedCorpus):
            return StreamedRows(corpus, tokenizer, part, length, seed=seed)
        return RowStream(pack_rows(corpus, tokenizer, part, length, cache=cache), seed=seed)

    if isinstance(corpus, MixedCorpus):
        streams = {name: stream(own) for name, own in corpus.corpora.items()}
        return MixedRows(streams, list(corpus.weights.values()), seed=seed)
    return stream(corpus)


def packed_for_fixed(
    data: Data,
    tokenizer: PreTrainedTokenizerFast,
    part: Part,
    *,
    rows: int,
    corpus: AnyCorpus | None = None,
    cache: Path = CACHE,
) -> dict[str, PackedRows]:
    """The packed rows that `fixed_batches` chooses its `rows` among, of every named source; else under ""."""
    corpus = open_corpus(data, cache=cache) if corpus is None else corpus
    corpora = corpus.corpora if isinstance(corpus, MixedCorpus) else {"": corpus}
    packed = {}
    for name, own in corpora.items():
        limit = rows if isinstance(own, StreamedCorpus) else max(rows, FIXED_ROWS_PACKED)
        packed[name] = pack_rows(own, tokenizer, part, data.sequence_length, cache=cache, limit=limit)
    return packed


def fixed_batches(
    data: Data,
    tokenizer: PreTrainedTokenizerFast,
    part: Part,
    *,
    rows: int,
    rows_per_batch: int = 8,
    corpus: AnyCorpus | None = None,
    cache: Path = CACHE,
) -> list[Batch]:
    """At most `rows` rows of a part, always the same ones in the same order: for evaluation and calibration.

    They are spread over the part's documents and depend on neither the run's seed nor the ranks; more rows hold the
    fewer as their beginning. The last batch may be smaller. With `data.sources` they come from all of them by weight,
    the first ones from one source each; a source that has too few leaves its places out.
    """
    packed = packed_for_fixed(data, tokenizer, part, rows=rows, corpus=corpus, cache=cache)
    weights = [source.weight for source in data.sources.values()] or [1.0]
    if not data.sources:  # so that asking for far more rows than there are costs nothing
        rows = min(rows, sum(map(len, packed.values())))
    source_R, place_R = Mixture(weights, seed=None).at(np.arange(rows))
    there_R = place_R < np.array([len(own) for own in packed.values()])[source_R]
    source_R, place_R = source_R[there_R], place_R[there_R]
    batches = []
    for at in range(0, len(place_R), rows_per_batch):
        source_B, place_B = source_R[at : at + rows_per_batch], place_R[at : at + rows_per_batch]
        rows_BT1 = np.empty((len(place_B), data.sequence_length + 1), dtype=np.uint32)
        keys_B, bytes_B = (np.empty(len(place_B), dtype=np.int64) for _ in range(2))
        for number, own in enumerate(packed.values()):
            mine_B = source_B == number
            indices = shuffled(place_B[mine_B], count=len(own), key=(0,))
            rows_BT1[mine_B], keys_B[mine_B] = own.rows_NT1[indices], own.keys_N[indices]
            bytes_B[mine_B] = own.bytes_N[indices]
        batches.append(make_batch(rows_BT1, keys_B, bytes_B, source_B if data.sources else None))
    return batches
