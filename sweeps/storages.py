"""Optuna's storages by URL, samplers and pruners by name, and a study opened or continued in them.

optuna_study = open_study(study, base)         # ConfigError when one of that name holds another study
"""

import difflib
import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from herd.run import config
from herd.run.errors import ConfigError, EnvironmentFault, first_line
from herd.run.folders import make_folder
from herd.run.schema import Config
from herd.run.store import shown
from sweeps import spaces
from sweeps.drivers import check_driver
from sweeps.settings import Sampler, Study

PATIENCE_S = (1, 2, 4, 8, 15, 30)  # waits between tries, about a minute in all
BUSY_S = 60  # SQLite waits so long for another worker's write
SETTINGS = "settings"
DATABASES = ("sqlite", "postgresql", "mysql")
Answer = TypeVar("Answer")


def open_study(study: Study, base: Config) -> optuna.Study:
    """The study in its storage, made if it is not there, with trial 0 or the grid waiting in it.

    Raises ConfigError when the storage holds a study of that name with other settings (the difference is shown),
    EnvironmentFault when the storage does not answer.
    """
    quiet()
    storage = patiently(lambda: open_storage(study.storage_url), study.storage_url)
    wanted = identity(study, base)
    found = patiently(
        lambda: optuna.create_study(
            storage=storage,
            study_name=study.name,
            sampler=make_sampler(study.sampler),
            pruner=make_pruner(study, base),
            directions=[objective.direction for objective in study.objectives],
            load_if_exists=True,
        ),
        study.storage_url,
    )
    known = found.user_attrs.get(SETTINGS)
    if known is None:
        found.set_user_attr(SETTINGS, wanted)
        _enqueue_first(found, study, base)
    else:
        _check_same(study, known, wanted)
    return found


def peek(study: Study, base: Config) -> optuna.Study | None:
    """The study as a file holds it, untouched; None where there is none yet, or it is on a server.

    Raises ConfigError when one of that name has other settings.
    """
    if study.storage_file is None or not study.storage_file.exists():
        return None
    quiet()
    storage = patiently(lambda: open_storage(study.storage_url), study.storage_url)
    try:
        found = patiently(lambda: optuna.load_study(study_name=study.name, storage=storage), study.storage_url)
    except KeyError:
        return None
    _check_same(study, found.user_attrs.get(SETTINGS), identity(study, base))
    return found


def open_storage(url: str) -> BaseStorage:
    """Optuna's storage of a URL that a study may have; EnvironmentFault when its driver is missing."""
    check_driver(url)
    kind, _, rest = url.partition(":")
    if kind.partition("+")[0] in DATABASES:
        options: dict[str, Any] = {"pool_pre_ping": True}
        if kind == "sqlite":
            make_folder(Path(rest.removeprefix("///")).absolute().parent, "storage")
            options = {"connect_args": {"timeout": BUSY_S}}
        return RDBStorage(url, engine_kwargs=options)
    if kind == "journal":
        make_folder(Path(rest).absolute().parent, "storage")
        return JournalStorage(JournalFileBackend(rest))
    host, _, port = rest.removeprefix("//").rpartition(":")
    return GrpcStorageProxy(host=host, port=int(port))


def patiently(call: Callable[[], Answer], url: str) -> Answer:
    """The answer of a call to the storage, tried for about a minute; then EnvironmentFault."""
    for wait in (*PATIENCE_S, None):
        try:
            return call()
        except Exception as error:
            if not _outage(error):
                raise
            if wait is None:
                raise EnvironmentFault(
                    f"storage = {shown(url)} does not answer ({_reason(error)}); start it and try again"
                ) from error
            time.sleep(wait)
    raise AssertionError("unreachable")


def make_sampler(sampler: Sampler, *salt: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler. A grid's points are enqueued, so its sampler is only asked when there are none left.

    salt: what tells one draw from another. Workers that all began with the study's own seed would draw the same points.
    """
    kind = sampler.kind
    seed = int(np.random.SeedSequence((sampler.seed, *salt)).generate_state(1)[0])
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed),
        "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=seed),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(population_size=sampler.population, seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "grid": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    try:
        return samplers[kind]()
    except ImportError as error:
        raise EnvironmentFault(f"sampler.kind = {kind} needs a package: {first_line(error)}") from error


def make_pruner(study: Study, base: Config) -> optuna.pruners.BasePruner:
    """The pruner of a study; its unit is the students' step, or the seed."""
    first, last = max(1, base.run.evaluate_every), base.run.steps  # 0: a metric of the training itself, every step
    startup, factor = study.pruner.startup, study.pruner.factor
    pruners = {
        "none": lambda: optuna.pruners.NopPruner(),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(first, factor),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(first, last, factor),
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=startup),
        "wilcoxon": lambda: optuna.pruners.WilcoxonPruner(n_startup_steps=startup),
    }
    return pruners[study.pruner.kind]()


def identity(study: Study, base: Config) -> dict[str, Any]:
    """What makes a study this study and no other: as JSON."""
    free = {"base", "set", "budget", "launch", "repeats", "folder", "storage"}
    settings = study.model_dump(mode="json", exclude=free)
    return json.loads(json.dumps(settings | {"base": config.dump(base)}))


def quiet() -> None:
    """Optuna speaks through us."""
    optuna.logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)


def _check_same(study: Study, known: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    if known is not None and known != wanted:
        lines = "\n".join(f"  {line}" for line in _differences(known, wanted))
        raise ConfigError(f"name = {study.name}: the study in {shown(study.storage_url)} is another one:\n{lines}\n"
                          "  undo the change, or give this study another name")  # fmt: skip


def _enqueue_first(found: optuna.Study, study: Study, base: Config) -> None:
    first = spaces.defaults(base, study.space) if study.enqueue_defaults else None
    if first is not None:
        found.enqueue_trial(first, user_attrs={"defaults": True})
    if study.sampler.kind == "grid":
        for params in grid_points(study):
            if params != first:
                found.enqueue_trial(params)


def grid_points(study: Study) -> list[dict[str, Any]]:
    """All points of the space, the last path turning fastest."""
    points: list[dict[str, Any]] = [{}]
    for path, values in spaces.grid(study.space).items():
        points = [point | {path: value} for point in points for value in values]
    return points


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = (_pretty(tree.get(key)) for tree in (old, new))
        changed = [
            line for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[:2] not in ("--", "++", "@@")
        ]
        lines += [f"{key}: {line}" for line in changed]
    return lines


def _pretty(value: Any) -> list[str]:
    return value.splitlines() if isinstance(value, str) else json.dumps(value, indent=1, sort_keys=True).splitlines()


def _outage(error: Exception) -> bool:
    """Whether the storage, and not what was asked of it, is the trouble. Drivers are optional, so known by name."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, StorageInternalError | OSError) or package in ("sqlalchemy", "grpc")


def _reason(error: Exception) -> str:
    """One line; gRPC's own first line says nothing."""
    return error.details() if hasattr(error, "details") else first_line(error)
