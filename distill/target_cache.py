"""The cache of soft targets of one run: read as its teacher, or written through while its teacher runs.

teacher = open_cached(config, tokenizer, corpus, model)                     # teacher.mode = cached
writing = open_writing(config, run_folder, tokenizer, corpus, vocabulary)   # teacher.cache with a running teacher
"""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill import run_record
from herd.data.corpora import Corpus, MixedCorpus
from herd.data.tokenizer import tokenizer_digest
from herd.llama4.source import is_spec
from herd.run import hub, ranks
from herd.run.errors import ConfigError, DataError
from herd.run.schema import Config
from teachers import cache
from teachers.cache import Identity
from teachers.cache.codecs import parse
from teachers.cache.identity import check, names_of_teacher, teacher_digest
from teachers.cache.manifest import FILE, Manifest
from teachers.cached import CachedTeacher, WriteThrough
from teachers.frozen import FrozenTeacher


def check_caches(config: Config) -> None:
    """What can be refused of `teacher.cache`, of every route too, without a model: its codec, and one that is read."""
    given = {"teacher.cache": config.teacher.cache}
    given |= {f"teacher.routes.{name}.cache": route.cache for name, route in config.teacher.routes.items()}
    for field, settings in given.items():
        if settings is None:
            continue
        if config.teacher.mode != "cached":
            parse(settings.codec, said=f"{field}.codec =")
        elif not (settings.path / FILE).is_file():
            raise DataError(
                f"{field}.path = {settings.path}: no {FILE} in it; name the folder that python -m teachers cache wrote"
            )


def trained_as(run_folder: Path) -> str:
    """The name a cache has a teacher under while it trains; its exported folder's lineage.json repeats it."""
    return run_record.read(run_folder)["id"]


def of_trained(config: Config, run_folder: Path) -> list[Path]:
    """The cache of the very teacher that trains in that run, if there is one."""
    if config.teacher.mode != "codistill" or config.teacher.cache is None:
        return []
    path = config.teacher.cache.path
    if not ((path / FILE).is_file() and (run_folder / run_record.FILE).is_file()):
        return []
    return [path] if Manifest.read(path).identity.teacher == trained_as(run_folder) else []


def open_cached(
    config: Config, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, model: PreTrainedModel | None
) -> CachedTeacher:
    """Targets read from `teacher.cache.path`; `model` is the live teacher that completes it, None without one.

    Raises DataError for a cache of another tokenizer, sequence length, temperature or data, or damaged; and of another
    teacher than `teacher.source`, where that is a folder, or on the hub and completes the cache.
    """
    settings, source = config.teacher.cache, config.teacher.source
    teacher = None
    if Path(source).is_dir() or (model is not None and not is_spec(source)):
        there = cache.open(settings.path, expecting=None).manifest.identity.teacher
        names = names_of_teacher(hub.local_folder(source, "teacher.source"))
        teacher = there if there in names else names[0]
    first, *others = _identities(config, tokenizer, corpus, vocabulary=None, teacher=teacher)
    reader = cache.open(settings.path, expecting=first)
    for identity in others:
        check(settings.path, reader.manifest.identity, reader.manifest.data, identity)
    if model is None:
        return CachedTeacher(reader, missing=settings.missing)
    if teacher is None:
        raise ConfigError(
            f"teacher.cache.missing = forward: teacher.source = {source} is built for this run and not the cache's "
            "teacher; name that one's folder or hub id, or set missing to refuse or hard"
        )
    manifest = reader.manifest
    made = cache.create(settings.path, manifest.identity, manifest.codec, seed=manifest.seed, facts=manifest.facts)
    writer = made.writer(f"rank{ranks.rank()}")
    return CachedTeacher(reader, missing="forward", live=FrozenTeacher(model), writer=writer)


def open_writing(
    config: Config, run_folder: Path, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, vocabulary: int
) -> WriteThrough:
    """The cache a running teacher fills, made or gone on with. Raises DataError for one of something else."""
    settings, source, trains = config.teacher.cache, config.teacher.source, config.teacher.mode == "codistill"
    if not trains and is_spec(source):
        raise ConfigError(f"teacher.cache: teacher.source = {source} is built for this run; there is nothing to keep")
    teacher = trained_as(run_folder) if trains else teacher_digest(hub.local_folder(source, "teacher.source"))
    first, *others = _identities(config, tokenizer, corpus, vocabulary=vocabulary, teacher=teacher)
    model = str(run_folder / "teacher") if trains else source
    facts = cache.facts(model, config.data, part="train")
    made = cache.create(settings.path, first, settings.codec, facts=facts)
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
