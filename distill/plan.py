"""What a run will hold and cost, from shapes alone: `python -m distill --config ... --dry-run --world-size 512`.

show(config, world_size=512, mfu=0.4) prints the resolved configuration and, for every model, bytes per rank by kind,
FLOPs per token, and what the herd does in a day. No device is touched and no data is read.
"""

from collections.abc import Mapping

import torch
from transformers import AutoModelForCausalLM, Llama4TextConfig

from distill.export_plans import check_export_plans
from distill.features import build_features
from distill.losses.chunks import chunk_of
from distill.target_cache import check_caches
from herd.data.corpora import check_source
from herd.data.tokenizer import check_path
from herd.llama4.plan import Plan, Setup, experts_divisible, plan, tokens_per_day
from herd.llama4.source import read_config
from herd.llama4.specs import SPECS
from herd.run.config import dump, split_batch
from herd.run.config_checks import too_long
from herd.run.errors import ConfigError
from herd.run.schema import Config, Route, Student, Teacher

GPU = torch.device("cuda")
SHOWN_BATCH = "batch.rows {rows} = micro_rows {micro} x accumulation {accumulation} x ranks {ranks}"


def show(config: Config, *, world_size: int, mfu: float) -> None:
    """Print the resolved configuration and the plan. Raises ConfigError or DataError for what could not run either."""
    check_source(config.data)
    if config.tokenizer.path is not None:
        check_path(config.tokenizer.path)
    check_caches(config)
    plans = plan_run(config, world_size=world_size)
    print(dump(config))
    show_plans(config, plans, world_size=world_size, mfu=mfu)


def show_plans(config: Config, plans: Mapping[str, Plan], *, world_size: int, mfu: float) -> None:
    """Print what `plan_run` made of every model, and what the herd costs."""
    for name, made in plans.items():
        source = _models(config)[name].source
        print(f"--- {name}: {SPECS[source].note if source in SPECS else source}")
        print(made.table())
    if config.objective.kind == "on_policy":
        print("--- not in these figures: what students write, its key-value cache, and the teacher's forwards over it")
    print("--- the herd", *costs(config, plans, world_size=world_size, mfu=mfu), sep="\n")


def costs(config: Config, plans: Mapping[str, Plan], *, world_size: int, mfu: float) -> list[str]:
    """What all models together cost, a line each: memory, tokens, FLOPs, days."""
    micro_rows, accumulation = split_batch(config, world_size)
    tokens_per_step = config.batch.rows * config.data.sequence_length
    flops = sum(made.flops_per_token for made in plans.values())
    daily = tokens_per_day(flops, world_size=world_size, mfu=mfu)
    steps = config.run.steps + config.teacher.head_start
    return [
        SHOWN_BATCH.format(rows=config.batch.rows, micro=micro_rows, accumulation=accumulation, ranks=world_size),
        f"state per rank      {sum(made.state.total for made in plans.values()) / 1e9:,.3f} GB, all models together",
        f"tokens              {steps * tokens_per_step:,} in {steps:,} steps of {tokens_per_step:,}",
        f"FLOPs per token     {flops:.4g}, all models together",
        f"tokens per day      {daily:.4g} at {mfu:.0%} of the peak of {world_size} H100 (bf16)",
        f"days                {steps * tokens_per_step / daily:.3g}",
    ]


def plan_run(config: Config, *, world_size: int) -> dict[str, Plan]:
    """The plan of every model of the run, the teacher first."""
    micro_rows, accumulation = split_batch(config, world_size)
    models = _models(config)
    plans = {}
    for name, model in models.items():
        source = model.source
        text = read_config(source, overrides=model.overrides, vocabulary=_vocabulary(config))
        if not isinstance(text, Llama4TextConfig):
            raise ConfigError(f"{name}: source = {source}: only Llama 4 can be planned, this is a {text.model_type}")
        if config.data.sequence_length > text.max_position_embeddings:
            raise ConfigError(too_long(config, name, source, text.max_position_embeddings))
        teaches = name not in config.students
        frozen = teaches and config.teacher.mode == "frozen"
        # A teacher that is only read has no engine: it is whole on every rank.
        expert_parallel = 1 if frozen else config.parallel.expert_parallel
        experts_divisible(text, expert_parallel, model=f"{name} ({source})")
        setup = Setup(
            zero=1 if frozen else config.parallel.zero,
            expert_parallel=expert_parallel,
            world_size=world_size,
            precision=config.run.precision,
            frozen=frozen,
            accumulation=accumulation,
            sequence_length=config.data.sequence_length,
            micro_rows=micro_rows,
            beside=() if teaches else _projections(config, name),
            chunk_tokens=config.loss.chunk_tokens
            or chunk_of(text.vocab_size, 2 if config.run.precision == "bf16" else 4, GPU),
        )
        plans[name] = plan(text, setup)
        if name in config.students and config.students[name].quantize:
            with torch.device("meta"):
                check_export_plans(name, config.students[name], AutoModelForCausalLM.from_config(text))
    return plans


def _models(config: Config) -> dict[str, Teacher | Route | Student]:
    """What is planned, teachers first."""
    teachers: dict[str, Teacher | Route] = {f"teacher.routes.{name}": r for name, r in config.teacher.routes.items()}
    if config.teacher.mode not in ("codistill", "frozen"):
        return dict(config.students)
    return (teachers or {"teacher": config.teacher}) | config.students


def _projections(config: Config, name: str) -> tuple[int, ...]:
    """Elements of every parameter that this student's feature losses learn: the losses are built, without storage."""
    if not config.loss.features:
        return ()
    with torch.device("meta"):
        student, teacher = (
            AutoModelForCausalLM.from_config(
                read_config(model.source, overrides=model.overrides, vocabulary=_vocabulary(config))
            )
            for model in (config.students[name], config.teacher)
        )
        features = build_features(config.loss.features, student, teacher, name=name, seed=0)
    return () if features is None else tuple(parameter.numel() for parameter in features.parameters())


def _vocabulary(config: Config) -> dict[str, int]:
    """A tokenizer that will be trained sets the size of nano vocabularies; real ones have their own."""
    return {"vocab_size": config.tokenizer.vocab_size} if config.tokenizer.path is None else {}
