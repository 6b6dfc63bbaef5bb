"""Which store a run writes to, and what is said about one that cannot be used."""

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from herd.run.errors import ConfigError, EnvironmentFault
from herd.run.store import artifact_root, check, mlruns_folder, prepare, resolve_uri, shown
from herd.run.tracking import open_tracker

TRACKER = """
import sys; from pathlib import Path; from herd.run.tracking import open_tracker
tracker = open_tracker(Path(sys.argv[1]), experiment="shared", run_name=sys.argv[2], uri=sys.argv[3])
tracker.metrics({"loss": float(sys.argv[2])}, 1)
tracker.finish(timeout_s=120)
"""
WRITER = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("CREATE TABLE tags_of_nobody (text TEXT)")
connection.execute("PRAGMA cache_size = 1")  # pages go to disk before the commit
connection.executemany("INSERT INTO tags_of_nobody VALUES (?)", [("x" * 1000,)] * 2000)
os.kill(os.getpid(), signal.SIGKILL)
"""
CREATOR = "import sys; from herd.run.store import prepare; prepare(sys.argv[3])"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _stamp(database: Path, schema: str) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (schema,))


def test_the_environment_wins_over_the_config_and_the_config_over_the_embedded_store(monkeypatch, tmp_path):
    embedded = resolve_uri()
    assert embedded == f"sqlite:///{mlruns_folder() / 'mlflow.db'}"
    assert artifact_root(embedded) == (mlruns_folder() / "artifacts").as_uri()
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///here/a.db") == f"sqlite:///{tmp_path}/here/a.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert resolve_uri("sqlite:///here/a.db") == "http://127.0.0.1:1"


@pytest.mark.parametrize("uri", ["mlruns", "/srv/mlruns", "file:///srv/mlruns", "sqlite://", "sqlite:///:memory:"])
def test_what_is_no_store_is_refused_in_one_line_before_training(tmp_path, uri):
    with pytest.raises(ConfigError, match=r"^tracking\.uri = .*not an MLflow store.*sqlite:///[^\n]*$"):
        open_tracker(tmp_path / "run", experiment="e", run_name="r", uri=uri)
    assert not (tmp_path / "run").exists()


def test_a_password_in_a_uri_is_not_shown():
    assert shown("https://me:secret@host:5000/x") == "https://host:5000/x"
    assert shown("sqlite:////a@b/c.db") == "sqlite:////a@b/c.db"
    assert shown("postgresql://me:pa/ss@host/x") == "postgresql://host/x"


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A store made by three processes that started at once, two of them with a run each."""
    folder = tmp_path_factory.mktemp("shared")
    uri = f"sqlite:///{folder}/mlruns/mlflow.db"
    scripts = (TRACKER, TRACKER, CREATOR)
    commands = [[sys.executable, "-c", script, str(folder / str(i)), str(i), uri] for i, script in enumerate(scripts)]
    clean = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean) for command in commands]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, errors
    assert errors == [""] * 3
    return folder / "mlruns" / "mlflow.db"


def test_three_processes_starting_at_once_share_one_complete_store(shared):
    with sqlite3.connect(shared) as connection:
        assert connection.execute("SELECT count(*) FROM experiments WHERE name = 'shared'").fetchone() == (1,)
        losses = "SELECT value FROM metrics WHERE key = 'loss' ORDER BY value"
        assert connection.execute(losses).fetchall() == [(0.0,), (1.0,)]
        ends = "SELECT DISTINCT status FROM runs"
        assert connection.execute(ends).fetchall() == [("FINISHED",)]


def test_a_store_of_another_mlflow_is_named_with_its_mend_before_training(tmp_path, shared, monkeypatch):
    check(f"sqlite:///{shared}")
    newer, older, other = (Path(shutil.copy(shared, tmp_path / name)) for name in ("newer.db", "older.db", "other.db"))
    _stamp(newer, "f00df00df00d")
    with pytest.raises(EnvironmentFault, match=r"newer\.db: written by a newer MLflow \(schema f00df00df00d; .*3\.\d"):
        open_tracker(tmp_path / "run", experiment="e", run_name="r", uri=f"sqlite:///{newer}")
    _stamp(older, "451aebb31d03")  # a migration of MLflow 1
    with pytest.raises(EnvironmentFault, match=r"older MLflow.*mlflow db upgrade sqlite:///.*older\.db"):
        prepare(f"sqlite:///{older}")
    other.write_text("not a database at all, " * 50)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    ui = subprocess.run([sys.executable, "-m", "herd.run.ui", "--port", "5999"], capture_output=True, text=True)
    assert (ui.returncode, ui.stdout, ui.stderr.count("\n")) == (3, "", 1)
    assert "other.db: not an MLflow store" in ui.stderr


def test_a_store_whose_writer_was_killed_in_the_middle_is_one(tmp_path, shared):
    database = tmp_path / "mlflow.db"
    shutil.copy(shared, database)
    subprocess.run([sys.executable, "-c", WRITER, str(database)], check=False)
    assert database.with_name("mlflow.db-journal").stat().st_size > 0  # what is half-written is to be taken back
    check(f"sqlite:///{database}")
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT count(*) FROM tags_of_nobody").fetchone() == (0,)


def test_creating_a_store_leaves_other_loggers_speaking(tmp_path):
    logger = logging.getLogger("herd.somebody.else")
    prepare(f"sqlite:///{tmp_path}/mlflow.db")
    assert not logger.disabled
