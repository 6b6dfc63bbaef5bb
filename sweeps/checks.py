"""A study held against the configuration it searches over and this machine: all that can be known before a trial runs.

base = check(study)          # ConfigError or EnvironmentFault, one line that names the field
"""

import difflib
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from herd.run import config, config_text
from herd.run.config_checks import export_name, split_batch
from herd.run.errors import ConfigError
from herd.run.folders import check_folder
from herd.run.schema import Config
from sweeps.drivers import check_driver
from sweeps.ranges import Choices
from sweeps.settings import PRUNERS_ON_STEPS, Study

NEAR_ENOUGH = 0.8  # of difflib's ratio: a metric so like a known one is a slip, not one of the stream's other numbers


def check(study: Study) -> Config:
    """The base configuration; ConfigError when it, the study's space or what it asks of its runs cannot be run."""
    base = config.load(study.base, study.set, flag="base")
    check_space(study)
    if program := study.launch.program:  # its metrics are its own
        check_program(program)
    else:
        check_objectives(study, base)
        check_pruner(study, base)
        check_ranks(study, base)
    check_driver(study.storage_url)
    check_folder(study.home, "folder")
    if study.storage_file is not None:
        check_folder(study.storage_file.parent, "storage")
    return base


def check_program(program: list[str]) -> None:
    """Refuse a program, or a Python script for it to run, that is not there."""
    if shutil.which(program[0]) is None:
        raise ConfigError(f"launch.program.0 = {program[0]}: no such program; give its path, or one on the PATH")
    words = [(place, word) for place, word in enumerate(program) if place and not word.startswith("-")]
    for place, word in words[:1]:
        if word.endswith(".py") and not Path(word).is_file():
            raise ConfigError(f"launch.program.{place} = {word}: no such file; give its path from {Path.cwd()}")


def check_space(study: Study) -> None:
    """Every end and choice must make a valid configuration."""
    for path, part in study.space.items():
        for value in part.choices if isinstance(part, Choices) else (part.low, part.high):
            override = f"{path}={config_text.write_inline(value)}"
            try:
                config.load(study.base, [*study.set, override], flag="base")
            except ConfigError as error:
                raise ConfigError(f"space.{path}: {_reason(error)}") from None


def check_objectives(study: Study, base: Config) -> None:
    """Refuse a metric that no run of this configuration can report."""
    known = [*heldout_metrics(base)]
    if study.reads_evaluations:
        known += evaluation_metrics(base)
    for place, objective in enumerate(study.objectives):
        metric, field = objective.metric, f"objectives.{place}.metric = {objective.metric}"
        near = difflib.get_close_matches(metric, known, n=3, cutoff=NEAR_ENOUGH)
        if metric in known:
            if metric.startswith("evals/") and base.run.ends == "trained":
                raise ConfigError(f"{field} is never measured: run.ends = trained; set it to reported")
            if metric.startswith("heldout/") and not _evaluates(study, base):
                raise ConfigError(
                    f"{field} is never measured: run.evaluate_every = 0; set it to the steps between checks"
                )
        elif metric.startswith(("heldout/", "evals/")) or near:
            room = metric.partition("/")[0]
            listed = near or [each for each in known if each.startswith(f"{room}/")][:6]
            raise ConfigError(f"{field}: no run of {study.base} reports it; use {', '.join(listed)}")


def check_pruner(study: Study, base: Config) -> None:
    """Refuse a pruner that would see a run once, at its end, or never."""
    if study.pruner.kind not in PRUNERS_ON_STEPS or not study.objectives[0].metric.startswith("heldout/"):
        return
    every, head_start = base.run.evaluate_every, base.teacher.head_start
    last = head_start + base.run.steps
    if _evaluates(study, base) and every and (last - 1) // every == head_start // every:
        raise ConfigError(
            f"pruner.kind = {study.pruner.kind} looks at held-out losses within a run: run.evaluate_every = {every} "
            f"leaves none before the end of run.steps = {base.run.steps}; set it lower, or pruner.kind to none"
        )


def check_ranks(study: Study, base: Config) -> None:
    """Refuse a number of ranks that the base's batch, or its experts, cannot be split over, unless searched."""
    if any(path.partition(".")[0] in ("batch", "parallel") for path in study.space):
        return
    try:
        split_batch(base, study.launch.ranks)
    except ConfigError as error:
        raise ConfigError(f"launch.ranks = {study.launch.ranks}: {error}") from None


def heldout_metrics(base: Config) -> Iterator[str]:
    """Names of the held-out losses in a run's metrics stream."""
    for model in [*base.students, *(["teacher"] if base.teacher.mode != "none" else [])]:
        yield f"heldout/{model}"
        yield from (f"heldout/{model}/{source}" for source in base.data.sources)


def evaluation_metrics(base: Config) -> list[str]:
    """Names of the numbers in the evaluation at the end of a run."""
    from evals import Result

    exports = [export_name(student, one) for student, facts in base.students.items() for one in facts.quantize]
    entries = [*base.students, *exports, *(["teacher"] if base.teacher.mode == "codistill" else [])]
    numbers = [field.name for field in fields(Result) if field.type in (int, float, int | None, float | None)]
    return [f"evals/{entry}/{number}" for entry in entries for number in numbers]


def _evaluates(study: Study, base: Config) -> bool:
    return base.run.evaluate_every > 0 or "run.evaluate_every" in study.space


def _reason(error: ConfigError) -> str:
    """The fault without the name of the file, which is the base and not what is wrong."""
    text = str(error)
    return text.partition(": ")[2] or text
