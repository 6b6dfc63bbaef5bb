"""Held-out rows of a corpus, cut by a model's own tokenizer, with the document each row starts in.

rows = rows_from(config.data, "runs/nano/students/scout", rows=64)
"""

from pathlib import Path

import numpy as np
import torch

from evals.rows import Rows
from herd.data.corpora import CACHE, AnyCorpus, open_corpus
from herd.data.splits import Part
from herd.data.streams import fixed_batches, packed_for_fixed
from herd.data.tokenizer import load_tokenizer
from herd.run.schema import Data


def rows_from(
    data: Data,
    model_folder: str | Path,
    *,
    rows: int,
    part: Part = "heldout",
    corpus: AnyCorpus | None = None,
    cache: Path = CACHE,
) -> Rows:
    """The rows that training's held-out losses are measured on, or their beginning if `rows` is fewer.

    `part`: rows of another part in their place. `corpus` saves opening it again. Raises DataError when the part has too
    little text for one row.
    """
    tokenizer = load_tokenizer(model_folder)
    corpus = open_corpus(data, cache=cache) if corpus is None else corpus
    batches = fixed_batches(data, tokenizer, part, rows=rows, corpus=corpus, cache=cache)
    # The same packed rows again (they are cached), to look up which document a row's key stands for.
    packed = packed_for_fixed(data, tokenizer, part, rows=rows, corpus=corpus, cache=cache)
    document_of: dict[tuple[int, int], int] = {}
    first = 0
    for number, own in enumerate(packed.values()):
        named = zip(own.keys_N.tolist(), own.first_N2[:, 0].tolist(), strict=True)
        document_of |= {(number, key): first + document for key, document in named}
        first += len(own.documents)
    keys_N: list[tuple[int, int]] = []
    for batch in batches:
        sources_B = torch.zeros_like(batch.keys_B) if batch.sources_B is None else batch.sources_B
        keys_N += zip(sources_B.tolist(), batch.keys_B.tolist(), strict=True)
    return Rows(
        input_ids_NT=torch.cat([batch.input_ids_BT for batch in batches]),
        labels_NT=torch.cat([batch.labels_BT for batch in batches]),
        bytes_N=torch.cat([batch.bytes_B for batch in batches]).numpy(),
        documents_N=np.array([document_of[key] for key in keys_N]),
        source=data.origin,
        fingerprint="+".join(own.fingerprint for own in packed.values()),
    )
