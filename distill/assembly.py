"""Brings a run together: tokenizer, rows, teacher and students, checked against each other.

parts = assemble(config, run_folder)        # after ranks.initialise()
parts.herd, parts.tokenizer, parts.rows, parts.heldout
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill import weighting
from distill.engine import Member, build_member
from distill.export_plans import check_export_plans
from distill.features import FeatureLosses, build_features
from distill.objectives.codistillation import Herd, Pupil
from distill.objectives.on_policy import OnPolicyHerd
from distill.routes import open_routes
from distill.target_cache import open_cached, open_writing
from distill.transferred import carry_over
from herd.data.batches import Batch, RowSource
from herd.data.corpora import Corpus, MixedCorpus, open_corpus
from herd.data.streams import fixed_batches, open_rows
from herd.data.tokenizer import describe_difference, load_tokenizer
from herd.data.tokenizer_training import open_tokenizer
from herd.llama4.expert_parallel import experts_divisible
from herd.llama4.experts import use_sparse_experts
from herd.llama4.source import is_spec, open_model
from herd.run import ranks
from herd.run.config import split_batch
from herd.run.config_checks import too_long
from herd.run.errors import ConfigError, DataError
from herd.run.schema import Config, Model, OnPolicy, Teacher
from teachers.cached import CachedTeacher
from teachers.frozen import FrozenTeacher
from teachers.recorder import Recorder
from teachers.routed import RoutedTeacher
from teachers.translated import TranslatedTeacher

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Assembly:
    """One run, ready to step."""

    herd: Herd
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    rows: RowSource
    heldout: list[Batch]
    micro_rows: int

    def origins(self, config: Config) -> dict[str, tuple[str, str]]:
        """Source and fingerprint of every named source; else of the only one, under `train`."""
        if not isinstance(self.corpus, MixedCorpus):
            return {"train": (config.data.source, self.corpus.fingerprint)}
        named = config.data.sources
        return {name: (named[name].source, own.fingerprint) for name, own in self.corpus.corpora.items()}


def assemble(config: Config, run_folder: Path) -> Assembly:
    """Open everything the configuration names. Raises ConfigError or DataError before any engine exists."""
    micro_rows, accumulation = split_batch(config, ranks.world_size())
    corpus = open_corpus(config.data)
    tokenizer = open_run_tokenizer(config, corpus)

    def open_teacher(config: Config, name: str) -> PreTrainedModel | None:
        return _open(config, name, config.teacher, tokenizer) if runs_a_teacher(config) else None

    teacher_model = open_teacher(config, "teacher")
    student_models = {name: _open(config, name, student, tokenizer) for name, student in config.students.items()}

    for name, model in student_models.items():
        check_export_plans(name, config.students[name], model)

    # After the models: rows too long for one are refused by it, not by what little text there is.
    rows = open_rows(config, tokenizer, "train", corpus=corpus)
    heldout = fixed_batches(
        config.data,
        tokenizer,
        "heldout",
        rows=config.data.heldout_rows,
        rows_per_batch=micro_rows,
        corpus=corpus,
    )
    learners = student_models | ({"teacher": teacher_model} if config.teacher.mode == "codistill" else {})
    transferred = {name: carry_over(config, name, model) for name, model in learners.items()}
    features = {
        name: build_features(
            config.loss.features, model, teacher_model, name=name, seed=_seed(config, f"{name}.features")
        )
        for name, model in student_models.items()
    }

    def member(name: str, model: PreTrainedModel, settings: Model | Teacher) -> Member:
        return build_member(
            name,
            model,
            config,
            lr=settings.lr or config.optim.lr,
            micro_rows=micro_rows,
            accumulation=accumulation,
            run_folder=run_folder,
            features=features.get(name),
            transfer=transferred[name],
        )

    vocabulary = None if teacher_model is None else teacher_model.config.get_text_config().vocab_size
    teacher: Member | FrozenTeacher | CachedTeacher | RoutedTeacher | None = None
    if config.teacher.routes:
        teacher = open_routes(config, run_folder, tokenizer, corpus, open_teacher)
    elif config.teacher.mode == "codistill":
        teacher = member("teacher", teacher_model, config.teacher)
    elif config.teacher.mode == "frozen":
        teacher = _frozen(config, teacher_model, tokenizer)
    elif config.teacher.mode == "cached":
        teacher = open_cached(config, tokenizer, corpus, teacher_model)
    pupils = {
        name: Pupil(
            member(name, model, config.students[name]),
            weighting.build(config.loss.weighting, steps=config.run.steps),
        )
        for name, model in student_models.items()
    }
    recorder = _recorder(teacher, [made for made in features.values() if made])
    writes = config.teacher.cache is not None and config.teacher.mode != "cached"
    writing = open_writing(config, run_folder, tokenizer, corpus, vocabulary) if writes else None
    if isinstance(config.objective, OnPolicy):
        herd: Herd = OnPolicyHerd(config, teacher, pupils, recorder, writing, vocabulary=len(tokenizer))
    else:
        herd = Herd(config, teacher, pupils, recorder, writing)
    return Assembly(herd, tokenizer, corpus, rows, heldout, micro_rows)


def runs_a_teacher(config: Config) -> bool:
    """Whether one teacher model is there: a cache needs none, unless it is completed; routes open theirs."""
    if config.teacher.routes:
        return False
    cached = config.teacher.mode == "cached"
    return config.teacher.cache.missing == "forward" if cached else config.teacher.mode != "none"


def _recorder(teacher: Member | FrozenTeacher | None, features: list[FeatureLosses]) -> Recorder | None:
    """Of what all students' feature losses look at in the teacher."""
    if not features:
        return None
    model = teacher.learner.model if isinstance(teacher, Member) else teacher.model
    return Recorder(model, set().union(*(losses.places(1) for losses in features)))


def open_run_tokenizer(config: Config, corpus: Corpus) -> PreTrainedTokenizerBase:
    """The configured tokenizer, else that of the first model that exists already, else one trained on the corpus.

    A teacher that may have its own (`loss.cross_tokenizer`) is not asked.
    """
    if config.tokenizer.path is None:
        silent = config.teacher.mode in ("none", "cached") or config.loss.cross_tokenizer is not None
        routed = [route.source for route in config.teacher.routes.values()]
        existing = [] if silent else routed or [config.teacher.source]
        existing += [student.source for student in config.students.values()]
        for source in existing:
            if not is_spec(source):
                return load_tokenizer(source)
    return open_tokenizer(config.tokenizer, corpus)


def _open(config: Config, name: str, model: Model | Teacher, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """One model, checked against the run's tokenizer, sequence length and, if it trains, expert parallelism."""
    vocabulary = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    opened = open_model(
        model.source,
        overrides=model.overrides,
        vocabulary=vocabulary,
        dtype=DTYPES[config.run.precision],
        seed=_seed(config, name),
    )
    text = opened.config.get_text_config()
    if not is_spec(model.source):
        rows = opened.get_input_embeddings().weight.shape[0]
        _check_tokenizer(config, name, model.source, tokenizer, rows=rows)
    if config.data.sequence_length > text.max_position_embeddings:
        raise ConfigError(too_long(config, name, model.source, text.max_position_embeddings))
    if config.parallel.expert_parallel == 1 or _is_only_read(model):
        return use_sparse_experts(opened)
    experts_divisible(opened.config, config.parallel.expert_parallel, model=f"{name} ({model.source})")
    return opened


def _is_only_read(model: Model | Teacher) -> bool:
    """True for a teacher without an engine: it is whole on every rank, its experts too."""
    return isinstance(model, Teacher) and model.mode != "codistill"


def _seed(config: Config, name: str) -> int:
    """A student's weights depend on its own name and the run's seed, so its control run starts from the same ones."""
    return config.run.seed * 1_000_003 + zlib.crc32(name.encode())


def _frozen(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> FrozenTeacher:
    """The frozen teacher, reading the students' tokens or, with `loss.cross_tokenizer`, their text."""
    if config.loss.cross_tokenizer is None:
        return FrozenTeacher(model)
    if is_spec(config.teacher.source):
        raise ConfigError(
            f"loss.cross_tokenizer: teacher.source = {config.teacher.source} is built for this run and has no "
            "tokenizer of its own; name a model folder or hub id, or leave cross_tokenizer out"
        )
    return TranslatedTeacher(model, student=tokenizer, teacher=load_tokenizer(config.teacher.source))


def _check_tokenizer(config: Config, name: str, source: str, tokenizer: PreTrainedTokenizerBase, *, rows: int) -> None:
    own = load_tokenizer(source)
    difference = describe_difference(tokenizer, own)
    if difference is not None and (name != "teacher" or config.loss.cross_tokenizer is None):
        own_one = ", or let a frozen teacher keep its own: loss.cross_tokenizer={kind: spans}"
        raise DataError(
            f"{name}: the tokenizer of {source} differs from the run's: {difference}; set tokenizer.path to the "
            f"teacher's folder, or choose teachers and students that share one"
            f"{'' if name.startswith('teacher.routes') else own_one}"
        )
    if rows < len(own):
        raise DataError(f"{name}: {source} has {rows} embedding rows for a vocabulary of {len(own)}")
