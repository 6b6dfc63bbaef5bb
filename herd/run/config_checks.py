"""Rules between fields that need no model, no data and no device; the rest of the checks live where the facts are.

for line in faults(config): ...        micro_rows, accumulation = split_batch(config, world_size=2)
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from herd.run import deepspeed_config, learning_checks, source_checks
from herd.run.errors import ConfigError
from herd.run.schema import Config, Quantize
from herd.run.section import NAME

RESERVED = ("teacher",)  # the teacher's own name in metrics, checkpoints and tracking


def faults(config: Config) -> Iterator[str]:
    """One line for each rule this configuration breaks, whatever machine it will run on."""
    for name in sorted(set(RESERVED) & set(config.students)):
        yield f"students.{name}: this name is the teacher's; choose another"
    if config.teacher.head_start and config.teacher.mode != "codistill":
        none = "there is no teacher to give one (teacher.mode = none)"
        cause = none if config.teacher.mode == "none" else f"a {config.teacher.mode} teacher does not train"
        yield f"teacher.head_start = {config.teacher.head_start}: {cause}; set it to 0, or teacher.mode to codistill"
    for name, student in config.students.items():
        yield from _export_faults(name, student.quantize)
    yield from learning_checks.faults(config)
    yield from source_checks.faults(config)
    optim, batch = config.optim, config.batch
    if optim.schedule == "wsd" and optim.warmup + optim.decay > 1:
        yield (
            f"optim.warmup + optim.decay = {optim.warmup:g} + {optim.decay:g}: "
            "the two phases overlap; their sum must be 1 or less"
        )
    if max(optim.betas) >= 1:
        yield f"optim.betas = {list(optim.betas)}: both must be less than 1"
    if batch.micro_rows is not None and batch.rows % batch.micro_rows:
        yield (
            f"batch.micro_rows = {batch.micro_rows}: must divide batch.rows = {batch.rows} at any number of ranks; "
            f"{use(divisors(batch.rows))}"
        )
    yield from deepspeed_config.conflicts(config.deepspeed.extra)


def too_long(config: Config, name: str, source: str, longest: int) -> str:
    """The line for rows that are longer than the model called `name` reads."""
    return (
        f"data.sequence_length = {config.data.sequence_length}: {name} ({source}) takes at most {longest} positions; "
        "lower it or choose another model"
    )


def split_batch(config: Config, world_size: int) -> tuple[int, int]:
    """Rows per forward and rank, and forwards per optimiser step: rows = micro_rows x accumulation x ranks.

    Raises ConfigError when that cannot hold, or the experts cannot be spread over this many ranks.
    """
    rows, micro_rows = config.batch.rows, config.batch.micro_rows
    equation = "batch.rows = micro_rows x accumulation x ranks"
    if rows % world_size:
        below, above = rows // world_size * world_size, -(-rows // world_size) * world_size
        near = f"{below} or {above}" if below else f"{above}"
        counts = divisors(rows)
        raise ConfigError(
            f"batch.rows = {rows}: {equation} does not hold on {world_size} ranks; set batch.rows to a multiple of "
            f"{world_size} (such as {near}), or start {_listed(counts)} {'rank' if counts == [1] else 'ranks'}"
        )
    per_rank = rows // world_size
    micro_rows = per_rank if micro_rows is None else micro_rows
    if per_rank % micro_rows:
        raise ConfigError(
            f"batch.micro_rows = {micro_rows}: {equation} does not hold, as each of {world_size} ranks has "
            f"{rows} / {world_size} = {per_rank} rows; {use(divisors(per_rank))}"
        )
    check_expert_parallel(config, world_size)
    return micro_rows, per_rank // micro_rows


def check_expert_parallel(config: Config, world_size: int) -> None:
    """Raise ConfigError unless the ranks fall into whole groups of `parallel.expert_parallel`."""
    size = config.parallel.expert_parallel
    if world_size % size:
        raise ConfigError(
            f"parallel.expert_parallel = {size}: must divide the {world_size} ranks; {use(divisors(world_size))}"
        )


def divisors(number: int) -> list[int]:
    """Whole numbers that divide `number`, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def use(values: list[int]) -> str:
    """The mend of a number that must be one of `values`: `use one of 1, 2, 4`, or `use 1`."""
    return f"use one of {_listed(values)}" if len(values) > 1 else f"use {values[0]}"


def export_name(student: str, quantize: Quantize) -> str:
    """What the export of a student is called, in its run's folder and in MLflow."""
    return f"{student}-{quantize.name}"


def _export_faults(student: str, listed: Sequence[Quantize]) -> Iterator[str]:
    for place, quantize in enumerate(listed):
        path = f"students.{student}.quantize.{place}"
        if (quantize.scheme is None) == (quantize.allocation is None):
            yield f"{path}: give a scheme, or an allocation in its place"
        elif quantize.allocation is not None:
            fields = ((name, getattr(quantize, name)) for name in ("group_size", "container"))
            given = (f"{name} = {value}" for name, value in fields if value != Quantize.model_fields[name].default)
            yield from (f"{path}.{each}: an allocation says it itself; leave it out" for each in given)
            if not re.fullmatch(NAME, quantize.allocation.stem):
                kind = "must be letters, digits and . _ - (the first a letter or digit)"
                yield f"{path}.allocation = {quantize.allocation}: the file names the export, and {kind}"
    for name, count in Counter(quantize.name for quantize in listed).items():
        if count > 1:
            yield (
                f"students.{student}.quantize: {name} is listed {count} times, and each would be the export "
                f"{student}-{name}; keep one"
            )


def _listed(values: list[int]) -> str:
    shown = values if len(values) <= 12 else [*values[:11], "...", values[-1]]
    return ", ".join(map(str, shown))
