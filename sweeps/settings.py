"""What a study is: a base configuration, a space over its fields, what counts, and how long. Optuna is not imported.

study = load("configs/sweeps/rates.yaml", ["budget.trials=40"])
study = Study(name="rates", base="configs/nano.yaml", space={"optim.lr": Range(low=5e-4, high=2e-2, log=True)}, ...)
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from herd.run import config_faults, config_text
from herd.run.errors import ConfigError
from herd.run.section import NAME, Name, Section
from herd.run.store import shown
from sweeps.ranges import Choices, Range

Filled = TypeVar("Filled", bound=Section)
PRUNERS_ON_STEPS = ("halving", "hyperband", "median")
STORAGE = re.compile(r"sqlite(\+\w+)?:///(?!:memory:).+|(postgresql|mysql)(\+\w+)?://.+|journal:.+|grpc://.+:\d+")
SET_BY_A_STUDY = (
    *("run.name", "run.folder", "run.seed", "run.keep_checkpoints", "run.ends"),
    *("tracking.register_models", "tracking.tags", "tracking.parent"),
)
MAY_BE_SET = ("run.ends",)
LONGEST_NAME = 128
OF_A_STUDY = "a study has base, space, objectives, ..."


class Objective(Section):
    metric: str = Field(min_length=1)
    """`heldout/MODEL` (from the metrics stream), any other key of metrics.jsonl, or `evals/ENTRY/FIELD`."""
    direction: Literal["minimize", "maximize"] = "minimize"


class Budget(Section):
    trials: int = Field(20, gt=0, le=1_000_000)
    """Trials that end on their own or are pruned; those of killed workers are made up for."""
    hours: float | None = Field(None, gt=0.0)
    """No trial starts later than this after the command did."""
    trial_minutes: float | None = Field(None, gt=0.0)
    """A trial that takes longer is stopped, and counts with what it has reached."""


class Sampler(Section):
    kind: Literal["tpe", "gp", "cmaes", "nsga2", "grid", "random"] = "tpe"
    seed: int = Field(0, ge=0, lt=2**31)
    """Of the sampler."""
    population: int = Field(12, ge=2)
    """nsga2: trials of a generation; a study of fewer than two generations is a random search."""


class Pruner(Section):
    kind: Literal["none", "halving", "hyperband", "median", "wilcoxon"] = "none"
    """halving, hyperband, median: on held-out checks within a run. wilcoxon: on seeds, against the best trial."""
    factor: int = Field(3, ge=2)
    """halving, hyperband: at each rung one trial in so many goes on, and the next rung is so many times as far."""
    startup: int = Field(3, ge=1)
    """median: trials that are never pruned. wilcoxon: seeds that are always run."""


class Repeats(Section):
    seeds: int = Field(0, ge=0)
    """Fresh seeds the best trial and the defaults are run with at the end, paired; 0 for none."""

    @field_validator("seeds")
    @classmethod
    def _enough(cls, seeds: int) -> int:
        if seeds == 1:
            raise ValueError("1 pair has no interval; use 2 or more, or 0 for none")
        return seeds


class Launch(Section):
    ranks: int = Field(1, gt=0)
    """Ranks of one trial."""
    workers: int = Field(1, gt=0, le=1024)
    """Trials at one time on this machine."""
    program: list[str] = []
    """What runs a trial in place of `deepspeed --module distill`: a program that takes --config, --set and --resume
    and writes metrics.jsonl into run.folder/run.name."""


class Study(Section):
    name: Name
    """Of its folder and in its storage, letters, digits and . _ - only; the file's name where that is one."""
    folder: Path = Path("runs/sweeps")
    """The study's folder is made here; trials are run folders inside it."""
    base: Path
    """Configuration every trial starts from."""
    set: list[str] = []
    """Overrides of the base, as --set takes them."""
    space: dict[str, Range | Choices]
    """Path in the configuration -> what it may be."""
    objectives: list[Objective] = Field(min_length=1)
    budget: Budget = Budget()
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()
    seed: int = Field(0, ge=0, lt=2**31)
    """run.seed of every trial: the same rows and the same start, so that trials differ by their settings alone."""
    seeds: int = Field(1, gt=0)
    """Runs of one trial, with seeds from `seed` on; its value is their mean."""
    repeats: Repeats = Repeats()
    launch: Launch = Launch()
    storage: str | None = None
    """sqlite:///FILE (one machine; the default, in the study's folder), journal:FILE (a shared disk), postgresql://,
    mysql://, or grpc://HOST:PORT."""
    enqueue_defaults: bool = True
    """Trial 0 is the base as it is, where its values lie in the space."""

    @field_validator("storage")
    @classmethod
    def _known(cls, url: str | None) -> str | None:
        if url is not None and not STORAGE.fullmatch(url):
            known = "sqlite:///FILE, journal:FILE, postgresql://..., mysql://... or grpc://HOST:PORT"
            raise ValueError(f"{shown(url)} is no storage; use {known}")
        return url

    @field_validator("space", mode="before")
    @classmethod
    def _written(cls, space: Any) -> Any:
        if space == {}:
            raise ValueError("no path in it; give it some, such as optim.lr: {low: 1e-3, high: 1e-2, log: true}")
        for path, part in space.items() if isinstance(space, dict) else ():
            if isinstance(part, Section):
                continue
            if not isinstance(part, dict) or not part.keys() & {"low", "high", "choices"}:
                shown = config_text.write_inline(part)
                raise ValueError(f"{path} = {shown}: write {{low: NUMBER, high: NUMBER}} or {{choices: [ONE, OTHER]}}")
        return space

    @model_validator(mode="after")
    def _distinct(self) -> "Study":
        for path in self.space:
            if inner := [other for other in self.space if other.startswith(f"{path}.")]:
                raise ValueError(f"space.{inner[0]} lies in space.{path}, which is drawn as well; keep one of the two")
        names = [objective.metric for objective in self.objectives]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"objectives: {twice[0]} is there {names.count(twice[0])} times; give every metric once")
        return self

    @model_validator(mode="after")
    def _named(self) -> "Study":
        if len(self.name) > LONGEST_NAME:
            raise ValueError(f"name is {len(self.name)} letters long, too many for a file; use {LONGEST_NAME} at most")
        if self.storage is None and "?" in str(self.folder):
            raise ValueError(f"folder = {self.folder}: SQLite takes what follows a ? for options; name it without")
        for override in self.set:
            if (path := override.partition("=")[0]) in SET_BY_A_STUDY and path not in MAY_BE_SET:
                mend = "use the study's own seed:" if path == "run.seed" else "take it out"
                raise ValueError(f"set: {path} is set by the study itself, for every trial; {mend}")
        return self

    @model_validator(mode="after")
    def _fits(self) -> "Study":
        kind, several = self.pruner.kind, len(self.objectives) > 1
        if several and kind != "none":
            raise ValueError(f"pruner.kind = {kind}: trials of several objectives cannot be pruned; use none")
        if kind in PRUNERS_ON_STEPS and self.seeds > 1:
            raise ValueError(f"pruner.kind = {kind} looks at one run, seeds = {self.seeds}; use wilcoxon, or seeds: 1")
        if kind == "wilcoxon" and self.seeds < 3:
            raise ValueError(f"pruner.kind = wilcoxon compares seeds, seeds = {self.seeds}; use 3 or more")
        if kind in PRUNERS_ON_STEPS and self.objectives[0].metric.startswith("evals/"):
            raise ValueError(f"pruner.kind = {kind}: {self.objectives[0].metric} is known at the end only; use none")
        if several and self.sampler.kind in ("cmaes",):
            raise ValueError(f"sampler.kind = {self.sampler.kind} takes one objective; use nsga2 or tpe")
        if self.sampler.kind == "grid" and any(isinstance(r, Range) and r.step is None for r in self.space.values()):
            raise ValueError("sampler.kind = grid needs choices, or a step in every range")
        if own := self.space.keys() & set(SET_BY_A_STUDY):
            raise ValueError(f"space.{min(own)} is set by the study itself, for every trial; take it out of the space")
        if self.sampler.kind == "cmaes" and any(isinstance(part, Choices) for part in self.space.values()):
            raise ValueError("sampler.kind = cmaes takes ranges only; use tpe")
        return self

    @property
    def home(self) -> Path:
        """Folder of the study."""
        return self.folder / self.name

    @property
    def reads_evaluations(self) -> bool:
        """Whether an objective is measured after training."""
        return any(objective.metric.startswith("evals/") for objective in self.objectives)

    @property
    def base_copy(self) -> Path:
        """The base as it was when the command began, beside the trials: what their runs read."""
        return self.home / "base.yaml"

    @property
    def trials(self) -> int:
        """Trials it has at most: the budget's, or a grid's points."""
        if self.sampler.kind != "grid":
            return self.budget.trials
        counts = (len(part.choices) if isinstance(part, Choices) else part.count for part in self.space.values())
        return min(self.budget.trials, math.prod(counts))

    @property
    def storage_url(self) -> str:
        """Where Optuna keeps it."""
        return self.storage or f"sqlite:///{self.home / 'study.db'}"

    @property
    def storage_file(self) -> Path | None:
        """The file of a storage that is one."""
        return file_of(self.storage_url)


def file_of(url: str) -> Path | None:
    """The file of a storage's URL; None for a server."""
    kind, _, rest = url.partition(":")
    if kind.partition("+")[0] == "sqlite":
        return Path(rest.removeprefix("///").partition("?")[0])  # options follow
    return Path(rest) if kind == "journal" else None


def load(path: str | Path, overrides: Sequence[str] = (), *, flag: str = "--study") -> Study:
    """Read a study's YAML, with `KEY=VALUE` overrides of its fields; ConfigError, one line a fault."""
    path = Path(path)
    tree = read_tree(path, wanted=OF_A_STUDY, flag=flag)
    if re.fullmatch(NAME, path.stem):
        tree = {"name": path.stem} | tree
    if not tree.keys() & {"base", "space", "objectives"}:
        if tree.keys() & {"grids", "coordinates", "depth_exponent", "horizon_exponent"}:
            raise ConfigError(f"{path}: a transfer check, no study; use python -m sweeps transfer --config {path}")
        if tree.keys() & {"run", "students"}:
            raise ConfigError(
                f"{path}: the configuration of a run, no study; {OF_A_STUDY}, and base is this file's place"
            )
    return fill(Study, tree, overrides, where=str(path))


def read_tree(path: Path, *, wanted: str, flag: str) -> dict[str, Any]:
    """The mapping a YAML file holds; ConfigError naming the command's flag, or what was wanted."""
    try:
        tree = config_text.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {flag} takes the path of a YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no mapping; {wanted}")
    return tree


def fill(kind: type[Filled], tree: dict[str, Any], overrides: Sequence[str], *, where: str) -> Filled:
    """A tree with `KEY=VALUE` overrides as a section of that kind; ConfigError, one line a fault."""
    for override in overrides:
        _override(tree, override)
    if lines := [line for _, line in config_faults.plain_faults(tree)]:
        raise ConfigError(f"{where}: {lines[0]}")
    try:
        return kind.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(_explain(where, error, kind)) from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--set {override}: write it as KEY=VALUE, such as seeds=3")
    try:
        value = config_text.parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: no YAML ({' '.join(str(error).split())})") from None
    while True:
        name = _first(tree, key)
        if name == key:
            tree[name] = value
            return
        tree, key = tree.setdefault(name, {}), key[len(name) + 1 :]
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {name} has no fields of its own; give it as a whole")
        if name == "space" and not any(key.startswith(f"{path}.") for path in tree):
            tree[key] = value  # its keys are paths with dots themselves
            return


def _first(tree: dict[str, Any], key: str) -> str:
    """The key of the mapping that a dotted key begins with: one that is there, dots and all, or up to the first dot."""
    return max((name for name in tree if f"{key}.".startswith(f"{name}.")), key=len, default=key.partition(".")[0])


def _explain(path: str, error: ValidationError, kind: type[Section]) -> str:
    lines = list(config_faults.explain(error, kind).values())
    return f"{path}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{path}: {len(lines)} faults", *lines])
