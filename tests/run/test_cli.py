"""Command lines: what is said where, exit codes, and that none of it waits for torch."""

import errno
import os
import subprocess
import sys

import pytest

from herd.run import cli, errors

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HEAVY = {"torch", "deepspeed", "transformers", "mlflow", "datasets", "numpy", "pandas", "matplotlib"}
PROGRAM = """
import sys
from herd.run import cli, config, errors
def main():
    parser = cli.parser("demo", description="Do it.", examples=("demo one", "demo two"), resume=True, dry_run=True)
    arguments = parser.parse_args()
    return cli.main_guard(lambda: config.load(arguments.config, arguments.set))
try:
    code = main()
finally:
    print("MODULES", *sys.modules)
sys.exit(code)
"""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
    )


def parser() -> cli.Parser:
    return cli.parser("demo", description="Do it.", examples=("demo one",), resume=True, dry_run=True)


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["--version"], 0), (["--config", "absent.yaml"], 2), (["--nonsense"], 2), ([], 2)],
)
def test_help_and_errors_load_nothing_heavy(words: list[str], code: int) -> None:
    done = run(*words)
    assert done.returncode == code
    assert not HEAVY & set(done.stdout.partition("MODULES")[2].split())


def test_help_is_grouped_and_ends_with_examples() -> None:
    text = run("--help").stdout.partition("MODULES")[0]
    places = [
        text.index(part) for part in ("what to run:", "going on:", "planning:", "other:", "examples:\n  demo one")
    ]
    assert places == sorted(places)
    assert text.endswith("examples:\n  demo one\n  demo two\n")
    assert "local_rank" not in text
    assert "deepspeed" not in text


def test_only_rank_0_speaks_for_the_command_line() -> None:
    for words in (["--help"], ["--nonsense"], []):
        done = run(*words, RANK="1", WORLD_SIZE="2")
        assert done.stdout.partition("MODULES")[0] == done.stderr == ""
        assert done.returncode == run(*words).returncode


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--confg", "x"], "error: --confg: unknown; did you mean --config?"),
        (["--config", "x", "--qqq"], "error: --qqq: unknown ("),
        (
            ["--config", "x", "--deepspeed"],
            "error: --deepspeed: the DeepSpeed configuration is generated from --config;",
        ),
        (["--config", "x", "--deepspeed_config", "y"], "error: --deepspeed_config: the DeepSpeed configuration is gen"),
        (["--config", "x", "--deepspeed_config=y"], "put further keys under deepspeed.extra"),
        (["--config", "x", "--world-size", "0"], "argument --world-size: 0: must be a whole number, 1 or more"),
        (["--config", "x", "--mfu", "2"], "argument --mfu: 2: must be more than 0, 1 at most"),
        ([], "error: the following arguments are required: --config"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parser().parse_args(words)
    assert left.value.code == errors.USAGE
    message = capsys.readouterr().err
    assert line in message
    assert len(message.splitlines()) == 1


def test_the_flags_of_launchers_are_accepted_and_the_rest_is_as_given() -> None:
    found = parser().parse_args(["--local_rank=3", "--config", "a", "--set", "x=1", "--set", "y=2", "--resume", "auto"])
    assert (found.config, found.set, found.resume, found.dry_run) == ("a", ["x=1", "y=2"], "auto", False)
    assert parser().parse_args(["--config", "a"]).resume == "never"
    assert parser().parse_args(["--local-rank", "0", "--config", "a", "--world-size", "512"]).world_size == 512


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
def test_the_command_line_can_be_typed_again(
    environment: dict[str, str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.command_line("distill", ["--local_rank=1", "--config", "a", "--set", "x=[1, 2]"]) == command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.ConfigError("run.steps = 0: must be more than 0"), 2, "error: run.steps = 0: must be more than 0\n"),
        (errors.EnvironmentFault("port 1 is in use"), 3, "error: port 1 is in use\n"),
        (errors.DataError("a: missing"), 4, "error: a: missing\n"),
        (errors.NumericalError("NaN"), 5, "error: NaN\n"),
        (errors.Interrupted("stopped at step 3; go on with: x"), 75, "stopped at step 3; go on with: x\n"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was saved since the last checkpoint\n"),
        (
            OSError(errno.ENOSPC, "No space", "/a/b"),
            3,
            "error: the disk is full (/a/b); free some space, or move run.folder\n",
        ),
    ],
)
def test_every_end_has_its_line_and_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        raise error

    assert cli.main_guard(body) == code
    assert capsys.readouterr().err == line


def test_a_command_that_ends_well_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main_guard(lambda: None) == errors.DONE
    assert capsys.readouterr() == ("", "")


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        raise ZeroDivisionError("a bug")

    assert cli.main_guard(body) == 1
    message = capsys.readouterr().err
    assert message.startswith("Traceback (most recent call last):\n")
    assert "in body" in message
    assert message.endswith("ZeroDivisionError: a bug\n")


def test_another_rank_leaves_the_word_to_rank_0_and_speaks_only_if_it_is_still_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: waited.append(seconds) or capsys.readouterr())

    def body() -> None:
        raise errors.DataError("shard 7 is gone")

    assert cli.main_guard(body) == 4
    assert waited == [cli.FOLLOWER_PAUSE_S]
    assert capsys.readouterr().err == "rank 1: error: shard 7 is gone\n"
