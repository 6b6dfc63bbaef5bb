"""A cached folder is built once, whole, by one process, and damage does not stay."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from herd.data.cached_folders import build_once
from herd.run.errors import DataError, EnvironmentFault


def build(folder: Path) -> None:
    (folder / "a.txt").write_text("content " * 100)
    (folder / "b.txt").write_text("more")


def refuse(folder: Path) -> None:
    raise AssertionError("built again")


def test_a_complete_folder_is_not_built_again(tmp_path: Path):
    folder = build_once(tmp_path / "x", build, what="thing")
    assert build_once(folder, refuse, what="thing") == folder
    assert (folder / "b.txt").read_text() == "more"


@pytest.mark.parametrize("name", ["a.txt", "b.txt", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_damage_is_reported_and_mended(name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = build_once(tmp_path / "x", build, what="thing")
    path = folder / name
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] if damage == "cut" else content[:middle] + b"\xff" + content[middle + 1 :])
    with caplog.at_level(logging.WARNING):
        build_once(folder, build, what="thing")
    assert path.read_bytes() == content
    (record,) = caplog.records
    assert "cached thing" in record.getMessage() and "building it again" in record.getMessage()


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path):
    def fail(folder: Path) -> None:
        build(folder)
        raise DataError("no text")

    with pytest.raises(DataError, match="no text"):
        build_once(tmp_path / "x", fail, what="thing")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert build_once(tmp_path / "x", build, what="thing").is_dir()


def test_a_cache_that_cannot_be_made_is_the_environments_fault(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(EnvironmentFault, match=r"cannot write the thing to .*file/sub \(Not a directory\)"):
        build_once(tmp_path / "file" / "sub" / "x", build, what="thing")


SLOW_BUILD = """
import sys, time
from pathlib import Path
from herd.data.cached_folders import build_once

def build(folder):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    (folder / "a.txt").write_text("half")
    time.sleep(float(sys.argv[3]))
    (folder / "a.txt").write_text("whole")

build_once(Path(sys.argv[1]), build, what="thing")
"""


def start(folder: Path, log: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", SLOW_BUILD, str(folder), str(log), str(seconds)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2])


def test_of_four_processes_one_builds(tmp_path: Path):
    processes = [start(tmp_path / "x", tmp_path / "log", 0.5) for _ in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"
    assert (tmp_path / "x" / "a.txt").read_text() == "whole"


def test_a_killed_build_is_neither_taken_for_whole_nor_in_the_way(tmp_path: Path):
    process = start(tmp_path / "x", tmp_path / "log", 600)
    while not (tmp_path / "log").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    build_once(tmp_path / "x", build, what="thing")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["a.txt", "b.txt", "manifest.json"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["x"]
