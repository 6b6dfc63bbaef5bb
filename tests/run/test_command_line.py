"""The command printed to start a run again is the one that was typed, launcher's options included where they show."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.run import command_line as module
from herd.run.command_line import command_line, typed
from herd.run.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
OURS = ["--config", "a.yaml", "--set", "x=[1, 2]"]
PROGRAM = """
import os, sys
from herd.run.command_line import command_line
if os.environ["RANK"] == "0":
    print(command_line("distill"))
"""


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher among the processes above, as on the second machine of a run."""
    monkeypatch.setattr(module, "_lines_above", lambda: iter([["sshd"], ["init"]]))


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({}, "python -m distill --config a --set 'x=[1, 2]'"),
        (
            {"WORLD_SIZE": "2", "LOCAL_SIZE": "2"},
            "deepspeed --num_accelerators 2 --module distill --config a --set 'x=[1, 2]'",
        ),
        (
            {"WORLD_SIZE": "16", "LOCAL_SIZE": "8"},
            "deepspeed --num_nodes 2 --num_accelerators 8 --module distill --config a --set 'x=[1, 2]'",
        ),
        (
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            "torchrun --nproc_per_node 2 -m distill --config a --set 'x=[1, 2]'",
        ),
    ],
)
def test_without_a_launcher_in_sight_the_numbers_of_ranks_and_machines_are_given(
    environment: dict[str, str], command: str, monkeypatch: pytest.MonkeyPatch, unseen: None
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert command_line("distill", ["--local_rank=1", "--config", "a", "--set", "x=[1, 2]"]) == command


@pytest.mark.parametrize(
    ("line", "start"),
    [
        (["/x/python", "/x/bin/deepspeed", "--quiet", "--module", "distill"], "deepspeed --quiet --module distill"),
        (["/x/bin/deepspeed", "--include", "a:0,1", "distill/train.py"], "deepspeed --include a:0,1 distill/train.py"),
        (["python", "-m", "deepspeed.launcher.runner", "--module", "distill"], "deepspeed --module distill"),
        (["python", "/x/bin/torchrun", "--standalone", "-m", "distill"], "torchrun --standalone -m distill"),
    ],
)
def test_a_launchers_command_line_gives_what_was_typed(line: list[str], start: str) -> None:
    assert shlex.join(typed([*line, *OURS], OURS)) == start


@pytest.mark.parametrize(
    "line",
    [
        ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", "--module", "distill", *OURS],
        ["bash", "-c", "deepspeed --module distill --config a.yaml"],
        ["python", "/x/bin/deepspeed", "--module", "distill", "--config", "other.yaml"],
        ["python", "-m", "distill", *OURS],
        [],
    ],
)
def test_other_processes_are_not_taken_for_the_launcher(line: list[str]) -> None:
    assert typed(line, OURS) is None


@given(options=st.lists(st.text(min_size=1, max_size=8), max_size=5), ours=st.lists(st.text(max_size=8), max_size=5))
def test_whatever_was_typed_comes_back_whole(options: list[str], ours: list[str]) -> None:
    line = ["python", "/x/bin/deepspeed", *options, "--module", "distill", *ours]
    assert typed(line, ours) == ["deepspeed", *options, "--module", "distill"]


def test_ranks_of_the_real_launcher_know_its_options(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    options = ["--quiet", "--master_port", str(free_port()), "--num_accelerators", "2"]
    outside = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", *options, str(script), *OURS],
        env=outside | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1:] == [shlex.join(["deepspeed", *options, str(script), *OURS])]
