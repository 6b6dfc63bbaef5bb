"""The cache of soft targets of one run: read as its teacher, or written through while its teacher runs.

teacher = open_cached(config, tokenizer, corpus, model)         # teacher.mode = cached
writing = open_writing(config, tokenizer, corpus, vocabulary)   # teacher.cache with a running teacher
"""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from herd.data.corpora import Corpus, MixedCorpus
from herd.data.tokenizer import tokenizer_digest
from herd.llama4.source import is_spec
from herd.run import ranks
from herd.run.errors import ConfigError
from herd.run.schema import Config
from teachers import cache
from teachers.cache import Identity
from teachers.cache.identity import check, names_of_teacher
from teachers.cached import CachedTeacher, WriteThrough
from teachers.frozen import FrozenTeacher


def trained_as(config: Config) -> str:
    """The name a cache has a teacher under while it trains; its exported folder's lineage.json repeats it."""
    return f"{config.tracking.experiment}/{config.run.name}"


def open_cached(
    config: Config, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, model: PreTrainedModel | None
) -> CachedTeacher:
    """Targets read from `teacher.cache.path`; `model` is the live teacher that completes it, None without one.

    Raises DataError for a cache of another tokenizer, sequence length, temperature or data, or damaged; and of another
    teacher than `teacher.source`, where that is a folder.
    """
    settings, source = config.teacher.cache, Path(config.teacher.source)
    teacher = None
    if source.is_dir():
        there = cache.open(settings.path, expecting=None).manifest.identity.teacher
        names = names_of_teacher(source)
        teacher = there if there in names else names[0]
    first, *others = _identities(config, tokenizer, corpus, vocabulary=None, teacher=teacher)
    reader = cache.open(settings.path, expecting=first)
    for identity in others:
        check(settings.path, reader.manifest.identity, reader.manifest.data, identity)
    if model is None:
        return CachedTeacher(reader, missing=settings.missing)
    if not source.is_dir():
        raise ConfigError(
            f"teacher.cache.missing = forward: teacher.source = {source} is not the folder of the cache's teacher; "
            "name that, or set missing to refuse or hard"
        )
    manifest = reader.manifest
    made = cache.create(settings.path, manifest.identity, manifest.codec, seed=manifest.seed, facts=manifest.facts)
    writer = made.writer(f"rank{ranks.rank()}")
    return CachedTeacher(reader, missing="forward", live=FrozenTeacher(model), writer=writer)


def open_writing(config: Config, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, vocabulary: int) -> WriteThrough:
    """The cache a running teacher fills, made or gone on with. Raises DataError for one of something else."""
    settings, source, trains = config.teacher.cache, config.teacher.source, config.teacher.mode == "codistill"
    if not trains and is_spec(source):
        raise ConfigError(f"teacher.cache: teacher.source = {source} is built for this run; there is nothing to keep")
    standing = names_of_teacher(Path(source))[0] if Path(source).is_dir() else source
    first, *others = _identities(
        config, tokenizer, corpus, vocabulary=vocabulary, teacher=trained_as(config) if trains else standing
    )
    model = config.run.folder / config.run.name / "teacher" if trains else source
    sources = [named.source for named in config.data.sources.values()] or [config.data.source]
    command = " && ".join(
        f"python -m teachers cache --model {model} --data {name} --out {settings.path} --complete" for name in sources
    )
    made = cache.create(settings.path, first, settings.codec, facts={"complete": command, "model": str(model)})
    for identity in others:
        made = cache.create(settings.path, identity, settings.codec, more_data=True)
    return WriteThrough(made, made.writer(f"rank{ranks.rank()}"), trains=trains)


def _identities(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    *,
    vocabulary: int | None,
    teacher: str | None,
) -> list[Identity]:
    """One for each source of the data."""
    whole = Identity(
        tokenizer=tokenizer_digest(tokenizer),
        vocabulary=vocabulary,
        sequence_length=config.data.sequence_length,
        temperature=config.loss.temperature,
        data=corpus.fingerprint,
        teacher=teacher,
    )
    if not isinstance(corpus, MixedCorpus):
        return [whole]
    return [replace(whole, data=own.fingerprint) for own in corpus.corpora.values()]
