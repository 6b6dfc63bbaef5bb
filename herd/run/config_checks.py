"""Rules between fields that need no model, no data and no device; the rest of the checks live where the facts are.

for line in faults(config): ...        micro_rows, accumulation = split_batch(config, world_size=2)
"""

from collections.abc import Iterator

from herd.run import deepspeed_config
from herd.run.errors import ConfigError
from herd.run.schema import Config

WITH_PARAMETER = ("jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl")
LEAST_PROBES = 8
RESERVED = ("teacher",)  # the teacher's own name in metrics, checkpoints and tracking


def faults(config: Config) -> Iterator[str]:
    """One line for each rule this configuration breaks, whatever machine it will run on."""
    for name in sorted(set(RESERVED) & set(config.students)):
        yield f"students.{name}: this name is the teacher's; choose another"
    if config.teacher.head_start and config.teacher.mode != "codistill":
        yield (
            f"teacher.head_start = {config.teacher.head_start}: a {config.teacher.mode} teacher does not train; "
            "set it to 0, or teacher.mode to codistill"
        )
    loss = config.loss
    if loss.divergence_parameter is not None and loss.divergence not in WITH_PARAMETER:
        yield (
            f"loss.divergence_parameter = {loss.divergence_parameter:g}: {loss.divergence} has none; leave it out, or "
            f"set loss.divergence to one of {', '.join(WITH_PARAMETER)}"
        )
    if loss.divergence_parameter == 1 and loss.divergence.startswith("skew"):
        yield f"loss.divergence_parameter = 1: {loss.divergence} is zero everywhere at 1; use less"
    yield from _weighting_faults(config)
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
            f"use one of {_listed(_divisors(batch.rows))}"
        )
    yield from deepspeed_config.conflicts(config.deepspeed.extra)


def _weighting_faults(config: Config) -> Iterator[str]:
    loss, run = config.loss, config.run
    kind = loss.weighting.kind
    if kind in ("calibration", "repair") and loss.temperature != 1:
        yield (
            f"loss.temperature = {loss.temperature:g}: loss.weighting.kind = {kind} compares the teacher's masses with "
            "the labels, which a temperature changes; set it to 1, or choose another kind"
        )
    if kind == "calibration" and loss.weighting.reference == "student" and loss.divergence != "forward_kl":
        yield (
            f"loss.divergence = {loss.divergence}: loss.weighting.reference = student reads q - p off the gradient of "
            "forward_kl; set that divergence, or loss.weighting.reference to teacher"
        )
    if kind == "slope" and not 0 < run.evaluate_every <= run.steps / LEAST_PROBES:
        yield (
            f"run.evaluate_every = {run.evaluate_every}: loss.weighting.kind = slope learns from held-out losses only; "
            f"it must be more than 0 and at most run.steps / {LEAST_PROBES} = {run.steps // LEAST_PROBES}"
        )


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
        raise ConfigError(
            f"batch.rows = {rows}: {equation} does not hold on {world_size} ranks; "
            f"set batch.rows to a multiple of {world_size} (such as {near}), or start {_listed(_divisors(rows))} ranks"
        )
    per_rank = rows // world_size
    micro_rows = per_rank if micro_rows is None else micro_rows
    if per_rank % micro_rows:
        raise ConfigError(
            f"batch.micro_rows = {micro_rows}: {equation} does not hold, as each of {world_size} ranks has "
            f"{rows} / {world_size} = {per_rank} rows; use one of {_listed(_divisors(per_rank))}"
        )
    check_expert_parallel(config, world_size)
    return micro_rows, per_rank // micro_rows


def check_expert_parallel(config: Config, world_size: int) -> None:
    """Raise ConfigError unless the ranks fall into whole groups of `parallel.expert_parallel`."""
    size = config.parallel.expert_parallel
    if world_size % size:
        raise ConfigError(
            f"parallel.expert_parallel = {size}: must divide the {world_size} ranks; "
            f"use one of {_listed(_divisors(world_size))}"
        )


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _listed(values: list[int]) -> str:
    shown = values if len(values) <= 12 else [*values[:11], "...", values[-1]]
    return ", ".join(map(str, shown))
