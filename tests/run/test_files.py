"""Atomic writes: whole under kill -9, clean on a full disk."""

import errno
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from herd.run import files
from herd.run.errors import ENVIRONMENT, DataError, DiskFull, EnvironmentFault

WRITE_FILES = """
import sys
from pathlib import Path
from herd.run.files import write_atomic
path, n = Path(sys.argv[1]) / "value", 0
while True:
    n += 1
    write_atomic(path, f"{n % 10}" * 200_000)
    print(n, flush=True)
"""
WRITE_FOLDERS = """
import sys
from pathlib import Path
from herd.run.files import fresh_folder, replace_folder
root, n = Path(sys.argv[1]), 0
while True:
    n += 1
    new = fresh_folder(root / ".model.tmp")
    for part in "abc":
        (new / part).write_text(f"{n}")
    replace_folder(new, root / "model")
    print(n, flush=True)
"""
FILL = """
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from herd.run import cli, files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
kind, path = sys.argv[1], Path(sys.argv[2])
def body():
    if kind == "atomic":
        files.write_atomic(path, b"x" * 1_000_000)
    elif kind == "unguarded":
        with path.with_name("other").open("wb") as stream:
            stream.write(b"x" * 1_000_000)
    else:
        with files.disk_faults(path):
            torch.save(torch.zeros(1_000_000), path.with_name("other"))
sys.exit(cli.main_guard(body))
"""


def killed_at_random(script: str, folder: Path, *, delay_s: float) -> None:
    """Run a writer until it has written once, and `delay_s` seconds on kill it, so that it dies in the middle."""
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        time.sleep(delay_s)
        child.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("delay_s", [0.0, 0.0013, 0.0071, 0.023, 0.11])
def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path: Path, delay_s: float) -> None:
    killed_at_random(WRITE_FILES, tmp_path, delay_s=delay_s)
    text = (tmp_path / "value").read_text()
    assert text == text[0] * 200_000


@pytest.mark.parametrize("delay_s", [0.0, 0.0013, 0.0071, 0.023, 0.11])
def test_a_replaced_folder_is_whole_whenever_its_writer_is_killed(tmp_path: Path, delay_s: float) -> None:
    killed_at_random(WRITE_FOLDERS, tmp_path, delay_s=delay_s)
    contents = {name: (tmp_path / "model" / name).read_text() for name in "abc"}
    assert len(set(contents.values())) == 1


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_with_and_without_an_exchange_of_names(
    tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "exchange", lambda first, second: False)
    for content in "12":
        new = files.fresh_folder(tmp_path / ".new")
        (new / "inner").mkdir()
        (new / "inner" / content).write_text(content)
        files.replace_folder(new, tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in (tmp_path / "final" / "inner").iterdir()] == ["2"]


def test_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "was").write_text(name)
    swapped = files.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "was").read_text() == ("b" if swapped else "a")
    with pytest.raises(FileNotFoundError):
        files.exchange(tmp_path / "a", tmp_path / "absent")


def test_a_written_file_keeps_the_usual_rights_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "new", "é")
    (tmp_path / "plain").write_text("é")
    assert (tmp_path / "new").read_bytes() == (tmp_path / "plain").read_bytes()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"new", "plain"}


@pytest.mark.parametrize("kind", ["atomic", "torch", "unguarded"])
def test_want_of_space_is_exit_code_3_in_one_line_and_the_old_content_stays(tmp_path: Path, kind: str) -> None:
    # A limit on the size of files meets the same code path as a full disk, and needs no disk to fill.
    path = tmp_path / "value"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", FILL, kind, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == ENVIRONMENT, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "free some space" in line
    assert path.read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} - {"other"} == {"value"}


def test_a_full_device_is_told_from_other_faults() -> None:
    device = Path("/dev/full")
    words = r"^cannot write /dev/full: the disk is full \(.* free at /dev\); free some space there$"
    with (
        pytest.raises(EnvironmentFault, match=words),
        files.disk_faults(device),
        device.open("wb", buffering=0) as stream,
    ):
        stream.write(b"x")
    with pytest.raises(PermissionError), files.disk_faults(Path("x")):
        raise PermissionError(1, "no")


def test_too_little_space_names_what_is_needed_and_where(tmp_path: Path) -> None:
    files.require_space(tmp_path / "not" / "yet", 1, what="a file")
    with pytest.raises(EnvironmentFault, match=rf"^a checkpoint needs 1,000,000,000\.00 GB, .* GB free at {tmp_path};"):
        files.require_space(tmp_path / "not" / "yet", 10**18, what="a checkpoint")


def full(path: Path | None = None) -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", *([] if path is None else [str(path)]))


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (lambda run: full(), "run"),
        (lambda run: full(run / "metrics.jsonl"), "run"),
        (lambda run: full(run.parent / "elsewhere" / "file"), "run"),
        (lambda run: full(run.parents[1] / ".cache" / "file"), ".cache/file"),
        (lambda run: RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed"), "run"),
        (lambda run: DiskFull("cannot write it", run / "exports"), None),
    ],
)
def test_a_full_disk_names_place_free_bytes_and_the_mend_of_whoever_can_move_it(
    error: Callable[[Path], Exception], named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "run"
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1_234_567))
    with pytest.raises(DiskFull) as caught, files.disk_faults(run, mend="move it"):
        raise error(run)
    line = str(caught.value)
    if named is None:
        assert line == "cannot write it, or move it"
    else:
        place = run if named == "run" else tmp_path / named
        words = f"cannot write {place}: the disk is full (1.2 MB free at {tmp_path}); free some space there"
        assert line == words + (", or move it" if named == "run" else "")


def test_bytes_that_are_known_to_be_needed_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(full()))
    with pytest.raises(DiskFull, match=rf"^cannot write {tmp_path}/a: the disk is full \(5\.0 kB to write, .* free at"):
        files.write_atomic(tmp_path / "a", b"x" * 5000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [PermissionError(1, "no"), ValueError("disk"), DataError("No space left on device: says a file")]
)
def test_other_faults_pass_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, files.disk_faults(tmp_path, mend="move it"):
        raise error
    assert caught.value is error


def test_a_full_disk_is_known_by_its_cause(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="the disk quota is used up; free"), files.disk_faults(tmp_path):
        raise RuntimeError("An error occurred while generating the dataset") from OSError(errno.EDQUOT, "Quota")


@pytest.mark.parametrize(("number", "text"), [(0, "0.0 kB"), (4321, "4.3 kB"), (12_345_678, "12.3 MB")])
def test_sizes_are_readable(number: int, text: str) -> None:
    assert files.size(number) == text


def test_a_digest_is_the_one_sha256sum_prints(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
