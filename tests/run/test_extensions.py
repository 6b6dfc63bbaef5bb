"""The compiled CPU op: stale locks are broken, living ones respected, a missing compiler named."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from herd.run import extensions
from herd.run.errors import ENVIRONMENT, EnvironmentFault

# As torch.utils.file_baton does it.
HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); time.sleep(600)"
COMPILE = "import os, sys, time; os.chdir(os.path.dirname(sys.argv[1])); print('held', flush=True); time.sleep(600)"


@pytest.fixture
def builder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process at work in tmp_path in the way `request.param` says."""
    command = [sys.executable, "-c", request.param, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        yield child
        child.kill()


def test_a_lock_without_a_living_builder_is_removed_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lock").touch()
    extensions.clear_stale_lock(tmp_path)
    assert not (tmp_path / "lock").exists()
    assert capsys.readouterr().err == f"removed {tmp_path / 'lock'}: the process that was building is gone\n"


def test_no_lock_needs_no_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extensions.clear_stale_lock(tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("builder", [HOLD, COMPILE], indirect=True)
def test_a_living_builder_is_waited_for_aloud_and_its_death_ends_the_wait(
    builder: subprocess.Popen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lock").touch()
    assert extensions.living_builders(tmp_path / "lock") == [builder.pid]
    waiting = threading.Thread(target=extensions.clear_stale_lock, args=[tmp_path])
    waiting.start()
    waiting.join(timeout=1.0)
    assert waiting.is_alive()
    assert (tmp_path / "lock").exists()
    builder.kill()
    waiting.join(timeout=60)
    assert not (tmp_path / "lock").exists()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"waiting for process {builder.pid}, which is building")
    assert lines[1].startswith("removed ")
    assert len(lines) == 2


@pytest.mark.parametrize("builder", [HOLD], indirect=True)
def test_a_builder_that_never_ends_is_named_and_left_alone(builder: subprocess.Popen, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=rf"lock: held for 0 s by process {builder.pid}; end it"):
        extensions.clear_stale_lock(tmp_path, patience_s=0)
    assert (tmp_path / "lock").exists()


def test_processes_take_turns_and_a_killed_one_frees_its_turn(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from herd.run.extensions import one_at_a_time\n"
        "with one_at_a_time(Path(sys.argv[1])): print('in', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "turn")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as second:
            time.sleep(0.5)
            os.set_blocking(second.stdout.fileno(), False)
            assert not second.stdout.read()
            first.kill()
            os.set_blocking(second.stdout.fileno(), True)
            assert second.stdout.readline() == b"in\n"
            second.kill()


def test_a_missing_compiler_is_exit_code_3_and_names_the_package(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "herd.run.extensions"],
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ENVIRONMENT
    assert done.stderr.splitlines()[-1] == (
        "error: no C++ compiler (no-such-compiler) on PATH, and some C++ must be compiled once; "
        "on Debian or Ubuntu: apt install g++, or set CXX"
    )


def test_the_projects_own_cache_is_used_unless_the_variable_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(extensions.VARIABLE, raising=False)
    root = Path(__file__).resolve().parents[2]
    assert extensions.use_project_folder() == root / ".cache" / "torch_extensions"
    assert os.environ[extensions.VARIABLE] == str(root / ".cache" / "torch_extensions")
    monkeypatch.setenv(extensions.VARIABLE, "elsewhere")
    assert extensions.use_project_folder() == Path("elsewhere")


def test_a_failed_build_shows_the_compilers_first_complaint() -> None:
    log = "Error building\n[1/3] c++\nx.cpp:1:10: fatal error: Python.h: No such file or directory\nninja: stop"
    assert extensions._first_error(log) == "x.cpp:1:10: fatal error: Python.h: No such file or directory"
    assert extensions._first_error("ninja is gone\nmore") == "ninja is gone"
