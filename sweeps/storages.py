"""Optuna's storages by URL, samplers and pruners by name, and a study opened or continued in them.

optuna_study = open_study(study, base)         # ConfigError when one of that name holds another study
"""

import difflib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState

from herd.run import config
from herd.run.errors import ConfigError, DataError, EnvironmentFault, first_line
from herd.run.files import full_disk
from herd.run.folders import make_folder
from herd.run.schema import Config
from herd.run.store import held, shown
from sweeps import spaces
from sweeps.drivers import check_driver
from sweeps.ledger import abandoned
from sweeps.settings import Sampler, Study, file_of
from sweeps.trial import set_aside

PATIENCE_S = (1, 2, 4, 8, 15, 30)  # waits between tries, about a minute in all
FIRST_TRIALS_S, GLANCE_S = 30.0, 0.5  # another command may be putting the first trials in
DAMAGE = ("malformed", "no such column", "has no column", "Invalid log format")  # as drivers and Optuna put it
LONGEST_RECORD = 1 << 20  # bytes of a journal's line
BUSY_S = 60  # SQLite waits so long for another worker's write
SETTINGS = "settings"
SQLITE = b"SQLite format 3\x00"
DATABASES = ("sqlite", "postgresql", "mysql")
Answer = TypeVar("Answer")


def open_study(study: Study, base: Config) -> optuna.Study:
    """The study in its storage, made if it is not there, with trial 0 or the grid waiting in it.

    Raises ConfigError when the storage holds a study of that name with other settings (the difference is shown) that
    has found something; one that has not, as its base fails, begins anew. EnvironmentFault when it does not answer.
    """
    quiet()
    if study.storage_url.startswith("journal:"):
        cut_torn_line(study.storage_file)
    storage = patiently(lambda: open_storage(study.storage_url), study.storage_url)
    wanted = identity(study, base)
    tools = {"sampler": make_sampler(study.sampler), "pruner": make_pruner(study, base)}
    found, made = patiently(lambda: _make_or_load(study, storage, tools), study.storage_url)
    if not made and _replaceable(found, wanted):
        optuna.delete_study(study_name=study.name, storage=storage)
        runs = sorted(study.home.glob("trial-*"))
        kept = f"; its runs are kept in {set_aside(study.home, runs)}" if runs else ""
        print(f"{study.name} begins anew: its settings changed, and no trial had ended well{kept}", flush=True)
        found, made = patiently(lambda: _make_or_load(study, storage, tools), study.storage_url)
    if not made:  # by another command, perhaps a moment ago
        until = time.monotonic() + FIRST_TRIALS_S
        while SETTINGS not in found.user_attrs and time.monotonic() < until:
            time.sleep(GLANCE_S)
    if SETTINGS not in found.user_attrs:
        # Last, as it says that the first trials are in: who dies before it leaves them to the next.
        patiently(lambda: _enqueue_first(found, study, base), study.storage_url)
        found.set_user_attr(SETTINGS, wanted)
    _check_same(study, found, wanted)
    return found


def _make_or_load(study: Study, storage: BaseStorage, tools: dict[str, Any]) -> tuple[optuna.Study, bool]:
    directions = [objective.direction for objective in study.objectives]
    try:
        return optuna.create_study(storage=storage, study_name=study.name, directions=directions, **tools), True
    except DuplicatedStudyError:
        return optuna.load_study(storage=storage, study_name=study.name, **tools), False


def find_study(study: Study, base: Config) -> optuna.Study | None:
    """The study as its storage holds it, untouched; None where there is none yet.

    Raises ConfigError when one of that name has other settings, EnvironmentFault when the storage does not answer.
    """
    file = study.storage_file
    if file is not None and not (file.exists() and file.stat().st_size):
        return None
    quiet()
    storage = patiently(lambda: open_storage(study.storage_url), study.storage_url)
    try:
        found = patiently(lambda: optuna.load_study(study_name=study.name, storage=storage), study.storage_url)
    except KeyError:
        return None
    wanted = identity(study, base)
    if _replaceable(found, wanted):
        return None
    _check_same(study, found, wanted)
    return found


def open_storage(url: str) -> BaseStorage:
    """Optuna's storage of a URL that a study may have; EnvironmentFault when its driver is missing."""
    check_driver(url)
    kind, _, rest = url.partition(":")
    if kind.partition("+")[0] in DATABASES:
        options: dict[str, Any] = {"pool_pre_ping": True}
        if kind == "sqlite":
            _check_database(file_of(url))
            options = {"connect_args": {"timeout": BUSY_S}}
        return RDBStorage(url, engine_kwargs=options)
    if kind == "journal":
        _check_journal(file_of(url))
        return JournalStorage(JournalFileBackend(rest))
    host, _, port = rest.removeprefix("//").rpartition(":")
    return GrpcStorageProxy(host=host, port=int(port))


def _check_database(file: Path) -> None:
    make_folder(file.absolute().parent, "storage")
    if file.is_dir():
        raise ConfigError(f"storage = sqlite:///{file}: a folder; give the name of a file, such as {file / 'study.db'}")
    if file.is_file() and (start := file.open("rb").read(len(SQLITE))) and start != SQLITE:
        raise ConfigError(f"storage = sqlite:///{file}: the file is no SQLite database; give another name")


def _check_journal(file: Path) -> None:
    make_folder(file.absolute().parent, "storage")
    if file.is_dir():
        raise ConfigError(f"storage = journal:{file}: a folder; give the name of a file, such as {file / 'study.log'}")
    with file.open("rb") if file.is_file() else BytesIO() as stream:
        first = stream.readline()
    if first.endswith(b"\n") and b'"op_code"' not in first:  # a line a writer is at is no fault
        raise ConfigError(f"storage = journal:{file}: the file is no journal of Optuna's; give another name")


def cut_torn_line(journal: Path) -> None:
    """Take off a last line that was never written to its end: the next one would be written onto it."""
    if not journal.is_file() or not journal.stat().st_size:
        return
    lock = JournalFileSymlinkLock(str(journal))
    lock.acquire()
    try:
        with journal.open("rb+") as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, end - LONGEST_RECORD))
            _, newline, torn = stream.read().rpartition(b"\n")
            if torn and (newline or end <= LONGEST_RECORD):
                stream.truncate(end - len(torn))
    finally:
        lock.release()


def patiently(call: Callable[[], Answer], url: str) -> Answer:
    """The answer of a call to the storage, tried for about a minute; then EnvironmentFault, DiskFull at once."""
    for wait in (*PATIENCE_S, None):
        try:
            return call()
        except Exception as error:
            if (full := full_disk(error, file_of(url))) is not None:
                raise full from error
            if (line := damage(error)) is not None:
                raise DataError(f"storage = {shown(url)} is damaged ({line}); restore it, or give another") from error
            if not _outage(error):
                raise
            if wait is None:
                raise EnvironmentFault(
                    f"storage = {shown(url)} does not answer ({_reason(error)}); start it and try again"
                ) from error
            time.sleep(wait)
    raise AssertionError("unreachable")


def damage(error: BaseException) -> str | None:
    """The line that says a file holds what neither SQLite nor a journal would have written; None where none does."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    told = [one for one in chain if isinstance(one, json.JSONDecodeError) or any(word in str(one) for word in DAMAGE)]
    return first_line(told[-1]) if told else None


def turn(study: Study) -> AbstractContextManager[None]:
    """Held while a worker takes a trial: SQLite lets two of them take the same one that waits. Servers and journals do
    not."""
    if not study.storage_url.startswith("sqlite"):
        return nullcontext()
    return held(study.storage_file.with_name(f".{study.storage_file.name}.turn"))


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
    every, last = base.run.evaluate_every, base.run.steps
    first = every if 0 < every < last else 1  # else what counts is no held-out loss, but logged at every step
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
    program = {"program": study.launch.program} if study.launch.program else {}
    return json.loads(json.dumps(settings | program | {"base": config.dump(base)}))


def quiet() -> None:
    """Optuna speaks through us."""
    optuna.logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)


def _replaceable(found: optuna.Study, wanted: dict[str, Any]) -> bool:
    """Whether a study of other settings has found nothing and is nobody's any more."""
    if found.user_attrs.get(SETTINGS) in (None, wanted):
        return False
    trials = found.get_trials(deepcopy=False)
    ended_well = any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)
    return not ended_well and all(abandoned(trial) for trial in trials if trial.state == TrialState.RUNNING)


def _check_same(study: Study, found: optuna.Study, wanted: dict[str, Any]) -> None:
    known = found.user_attrs.get(SETTINGS)
    if known is not None and known != wanted:
        lines = "\n".join(f"  {line}" for line in _differences(known, wanted))
        raise ConfigError(f"name = {study.name}: the study in {shown(study.storage_url)} is another one:\n{lines}\n"
                          "  undo the change, or give this study another name")  # fmt: skip


def _enqueue_first(found: optuna.Study, study: Study, base: Config) -> None:
    first = spaces.defaults(base, study.space) if study.enqueue_defaults else None
    if first is not None:
        found.enqueue_trial(first, user_attrs={"defaults": True}, skip_if_exists=True)
    if study.sampler.kind == "grid":
        for params in grid_points(study):
            found.enqueue_trial(params, skip_if_exists=True)


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
