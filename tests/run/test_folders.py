"""Folders claimed by one process at a time."""

import subprocess
import sys
import time

import pytest

from herd.run.errors import EnvironmentFault
from herd.run.folders import claimed

HOLD = "import sys, time; from pathlib import Path; from herd.run.folders import claimed\n"
HOLD += "with claimed(Path(sys.argv[1]), 'run.name'): print('held', flush=True); time.sleep(float(sys.argv[2]))"


def hold(folder, seconds):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_folder_in_which_another_process_works_is_refused(tmp_path):
    holder = hold(tmp_path / "runs" / "one", 60)
    try:
        with (
            pytest.raises(EnvironmentFault, match=r"^run\.name: another process is at work in .*runs/one; wait for it"),
            claimed(tmp_path / "runs" / "one", "run.name", patience_s=0.3),
        ):
            pass
        with claimed(tmp_path / "runs" / "two", "run.name", patience_s=0.3):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_a_killed_process_leaves_its_folder_to_the_next(tmp_path):
    holder = hold(tmp_path / "one", 60)
    holder.kill()
    holder.wait()
    with claimed(tmp_path / "one", "run.name", patience_s=5):
        assert not (tmp_path / "one").exists()
    assert list(tmp_path.iterdir()) == []


def test_who_waits_gets_the_folder_when_it_is_left(tmp_path):
    holder, started = hold(tmp_path / "one", 1), time.monotonic()
    with claimed(tmp_path / "one", "run.name"):
        assert holder.wait(10) == 0
    assert time.monotonic() - started < 25
