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
from herd.data.corpora import CACHE, StoredCorpus, StreamedCorpus, open_corpus
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
        count = len(self._packed)
        places = np.arange(step * rows, (step + 1) * rows)
        indices = np.empty(rows, dtype=np.int64)
        for epoch in range(int(places[0]) // count, int(places[-1]) // count + 1):
            inside = places // count == epoch
            indices[inside] = shuffled(places[inside] % count, count=count, key=(self._seed, epoch))
        return indices

    def take(self, step: int, *, rows: int, micro_rows: int, rank: int, world: int) -> list[Batch]:
        """See `RowSource.take`."""
        indices = self.rows_of_step(step, rows)
        if rank == 0:
            self._tell_wrap(step, rows)
        chosen = [indices[places] for places in places_of_rank(rows, micro_rows=micro_rows, rank=rank, world=world)]
        return [batch_of(self._packed, indices_B) for indices_B in chosen]

    def _tell_wrap(self, step: int, rows: int) -> None:
        count = len(self._packed)
        epoch = ((step + 1) * rows - 1) // count
        if epoch > 0 and not self._told:
            self._told = True
            log.warning(
                "step %d: all %d training rows have been read; epoch %d goes through them in another order",
                step,
                count,
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
    corpus: StoredCorpus | StreamedCorpus | None = None,
    cache: Path = CACHE,
) -> RowSource:
    """The rows of a part in training order, packed on disk or, with data.streaming, as they come.

    `corpus` saves opening it again. Raises DataError when the part has too little text for one row.
    """
    corpus = open_corpus(config.data, cache=cache) if corpus is None else corpus
    length, seed = config.data.sequence_length, config.run.seed
    if isinstance(corpus, StreamedCorpus):
        return StreamedRows(corpus, tokenizer, part, length, seed=seed)
    return RowStream(pack_rows(corpus, tokenizer, part, length, cache=cache), seed=seed)


def packed_for_fixed(
    data: Data,
    tokenizer: PreTrainedTokenizerFast,
    part: Part,
    *,
    rows: int,
    corpus: StoredCorpus | StreamedCorpus | None = None,
    cache: Path = CACHE,
) -> PackedRows:
    """The packed rows that `fixed_batches` chooses its `rows` among."""
    corpus = open_corpus(data, cache=cache) if corpus is None else corpus
    limit = rows if isinstance(corpus, StreamedCorpus) else max(rows, FIXED_ROWS_PACKED)
    return pack_rows(corpus, tokenizer, part, data.sequence_length, cache=cache, limit=limit)


def fixed_batches(
    data: Data,
    tokenizer: PreTrainedTokenizerFast,
    part: Part,
    *,
    rows: int,
    rows_per_batch: int = 8,
    corpus: StoredCorpus | StreamedCorpus | None = None,
    cache: Path = CACHE,
) -> list[Batch]:
    """At most `rows` rows of a part, always the same ones in the same order: for evaluation and calibration.

    They are spread over the part's documents and depend on neither the run's seed nor the ranks; more rows hold the
    fewer as their beginning. The last batch may be smaller.
    """
    packed = packed_for_fixed(data, tokenizer, part, rows=rows, corpus=corpus, cache=cache)
    indices = shuffled(np.arange(min(rows, len(packed))), count=len(packed), key=(0,))
    return [batch_of(packed, indices[at : at + rows_per_batch]) for at in range(0, len(indices), rows_per_batch)]
