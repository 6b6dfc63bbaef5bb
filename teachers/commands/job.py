"""What an offline cache is made from: the teacher's folder, the rows of the data, and what the cache is of.

    job = prepare(options);  job.identity, job.packed, job.indices_N

No weight is loaded. Suffix legend: N rows of the data.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from herd.data.corpora import Corpus, open_corpus
from herd.data.packing import PackedRows, pack_rows
from herd.data.permutation import shuffled
from herd.data.tokenizer import load_tokenizer, tokenizer_digest
from herd.llama4.source import read_config
from herd.run import hub
from herd.run.errors import ConfigError
from teachers.cache.identity import Identity, names_of_teacher
from teachers.cache.manifest import Manifest
from teachers.commands.options import Options


@dataclass(frozen=True)
class Job:
    """What there is to do: the rows, in the order in which training reads them, and what the cache is of."""

    folder: Path
    """Of the teacher."""
    corpus: Corpus
    packed: PackedRows
    indices_N: np.ndarray
    identity: Identity


def prepare(options: Options) -> Job:
    """Open data and tokenizer and name the cache; the teacher's weights are not loaded yet."""
    folder = hub.local_folder(options.model, "--model")
    tokenizer = load_tokenizer(folder)
    corpus = open_corpus(options.data)
    packed = pack_rows(corpus, tokenizer, options.part, options.data.sequence_length)
    config = read_config(str(folder))
    if options.data.sequence_length > getattr(config, "max_position_embeddings", options.data.sequence_length):
        raise ConfigError(
            f"--sequence-length = {options.data.sequence_length}: the teacher reads at most "
            f"{config.max_position_embeddings} tokens"
        )
    identity = Identity(
        tokenizer=tokenizer_digest(tokenizer),
        vocabulary=config.vocab_size,
        sequence_length=options.data.sequence_length,
        temperature=options.temperature,
        data=corpus.fingerprint,
        teacher=_teacher_name(folder, options),
    )
    count = len(packed) if options.rows is None else min(options.rows, len(packed))
    indices_N = shuffled(np.arange(count), count=len(packed), key=(options.order_seed, 0))
    return Job(folder, corpus, packed, indices_N, identity)


def _teacher_name(folder: Path, options: Options) -> str:
    """The weights' digest; when completing, the name the cache has this teacher under."""
    names = names_of_teacher(folder)
    if options.complete and (there := Manifest.read(options.out).identity.teacher) in names:
        return there
    return names[0]
