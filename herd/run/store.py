"""Where MLflow keeps things: which store a run writes to, and the embedded one made safe to share.

    uri = resolve_uri(config.tracking.uri)      # MLFLOW_TRACKING_URI, else the config, else mlruns/mlflow.db
    prepare(uri)                                # creates a SQLite store once, whoever comes first

Nothing here imports MLflow except the creation of a new store.
"""

import fcntl
import importlib.metadata
import importlib.util
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from herd.run.errors import ConfigError, EnvironmentFault
from herd.run.files import source_root

SQLITE = "sqlite:///"
SERVERS = ("http", "https", "postgresql", "mysql", "mssql", "databricks")


def mlruns_folder() -> Path:
    """`mlruns/` of the repository when herd is installed editable, of the working folder otherwise."""
    root = source_root()
    return (root if (root / "pyproject.toml").exists() else Path.cwd()) / "mlruns"


def resolve_uri(configured: str | None = None) -> str:
    """The store's URI: MLFLOW_TRACKING_URI wins, then `configured`, then the embedded store; SQLite paths absolute.

    Raises ConfigError for what is no store (a bare folder, which MLflow refuses since 3.13; an in-memory database).
    """
    field = "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "tracking.uri"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or configured or f"{SQLITE}{mlruns_folder() / 'mlflow.db'}"
    path = database_path(uri)
    if path is not None and path.name and path.name != ":memory:":
        return f"{SQLITE}{path.absolute()}"
    if urlsplit(uri).scheme.split("+")[0] in SERVERS:
        return uri
    raise ConfigError(
        f"{field} = {shown(uri)}: not an MLflow store; give sqlite:///FOLDER/mlflow.db or http://HOST:PORT"
    )


def database_path(uri: str) -> Path | None:
    """The file behind a `sqlite:///` URI, None for any other store."""
    return Path(uri.removeprefix(SQLITE).split("?")[0]) if uri.startswith(SQLITE) else None


def artifact_root(uri: str) -> str | None:
    """Folder (as a URI) of the artifacts beside a SQLite store; None where a server decides."""
    path = database_path(uri)
    return (path.parent / "artifacts").as_uri() if path else None


def shown(uri: str) -> str:
    """`uri` fit for a terminal or a file: without user name and password."""
    scheme, separator, rest = uri.partition("://")
    if not separator or rest.startswith("/") or "@" not in rest:
        return uri
    return f"{scheme}://{rest.rpartition('@')[2]}"  # a password may hold anything, slashes too


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock file `path` exclusively, across processes and threads; waits for its turn.

    The kernel drops it with the process, so a kill leaves no stale lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def prepare(uri: str) -> None:
    """Create the SQLite store behind `uri` unless it is there; a store of another kind is left to its server.

    Several processes may call this at once: one creates (about 2 s), the others wait. The database appears under its
    name only when complete. Raises EnvironmentFault as `check` does.
    """
    path = database_path(uri)
    if path is None or _complete(path):
        return check(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path.with_name(".mlflow.lock")):
        if not _complete(path):
            with loggers_kept():
                _create(path, artifact_root(uri))
    check(uri)


@contextmanager
def loggers_kept() -> Iterator[None]:
    """MLflow's migrations switch off every logger that exists in the process; switch ours on again."""
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    speaking = [logger for logger in loggers if not logger.disabled]
    try:
        yield
    finally:
        for logger in speaking:
            logger.disabled = False


def check(uri: str) -> None:
    """Raise EnvironmentFault when the SQLite store behind `uri` is not one that this MLflow can use. Milliseconds."""
    path = database_path(uri)
    if path is None or not _complete(path):
        return
    found = _schema(path)
    known, newest = _known_schemas()
    version = importlib.metadata.version("mlflow")
    if found not in known:
        raise EnvironmentFault(
            f"{path}: written by a newer MLflow (schema {found}; the installed {version} knows up to {newest}); "
            f"`pip install -U mlflow`, or set tracking.uri or MLFLOW_TRACKING_URI to another store"
        )
    if found != newest:
        raise EnvironmentFault(
            f"{path}: written by an older MLflow (schema {found}; the installed {version} wants {newest}); "
            f"copy the file, then `mlflow db upgrade {uri}`"
        )


def _complete(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _schema(path: Path) -> str:
    # Not read-only: what a writer killed in the middle has left, SQLite takes back before anybody reads.
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=20)
    try:
        return connection.execute("SELECT version_num FROM alembic_version").fetchone()[0]
    except (sqlite3.DatabaseError, TypeError) as error:
        raise EnvironmentFault(
            f"{path}: not an MLflow store ({error}); move the file away, or set tracking.uri to another store"
        ) from error
    finally:
        connection.close()


def _known_schemas() -> tuple[set[str], str]:
    """Every schema revision the installed MLflow can migrate from, and the newest; read without importing it."""
    spec = importlib.util.find_spec("mlflow")
    if spec is None:
        raise EnvironmentFault("mlflow is not installed; `pip install mlflow`, or set tracking.enabled=false")
    folder = Path(spec.submodule_search_locations[0]) / "store" / "db_migrations" / "versions"
    texts = [file.read_text(encoding="utf-8") for file in folder.glob("*.py")]
    known = {match for text in texts for match in re.findall(r'^revision = "(\w+)"', text, re.MULTILINE)}
    replaced = {match for text in texts for match in re.findall(r'^down_revision = "(\w+)"', text, re.MULTILINE)}
    (newest,) = known - replaced
    return known, newest


def _create(path: Path, artifacts: str) -> None:
    """Build the database under another name and move it into place, so that a kill never leaves half a schema."""
    import mlflow  # noqa: F401 - configures its loggers when imported; quieten them after that
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    store = SqlAlchemyStore(f"{SQLITE}{unfinished}", artifacts)
    store.engine.dispose()
    os.replace(unfinished, path)
