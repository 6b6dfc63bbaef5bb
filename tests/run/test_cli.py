"""Command lines: what is said where, exit codes, and that none of it waits for torch."""

import errno
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from herd.run import cli, errors, files, last_words

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
usage, FREE = namedtuple("usage", "total used free"), "4.3 kB"
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
        (
            ["--config", "x", "--world-size", "8"],
            "error: --world-size: plans only and changes no run; add",
        ),
        (["--config", "x", "--mfu=0.3", "--set", "a=1"], "error: --mfu: plans only and changes no run; add --dry-run"),
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
    words = ["--local-rank", "0", "--config", "a", "--dry-run", "--world-size", "512"]
    assert parser().parse_args(words).world_size == 512


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.ConfigError("run.steps = 0: must be more than 0"), 2, "error: run.steps = 0: must be more than 0\n"),
        (errors.EnvironmentFault("port 1 is in use"), 3, "error: port 1 is in use\n"),
        (errors.DataError("a: missing"), 4, "error: a: missing\n"),
        (errors.NumericalError("NaN"), 5, "error: NaN\n"),
        (errors.Interrupted("stopped at step 3; go on with: x"), 75, "stopped at step 3; go on with: x\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space"), 3, "error: the disk is full; free some space\n"),
        (
            OSError(errno.ENOSPC, "No space", "/a/b"),
            3,
            f"error: cannot write /a/b: the disk is full ({FREE} free at /); free some space there\n",
        ),
    ],
)
def test_every_end_has_its_line_and_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: usage(total=10**9, used=10**9 - 4321, free=4321))

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
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: waited.append(seconds) or capsys.readouterr())
    monkeypatch.setattr(last_words.tempfile, "gettempdir", lambda: str(tmp_path))

    def body() -> None:
        raise errors.DataError("shard 7 is gone")

    assert cli.main_guard(body) == 4
    assert waited == [cli.FOLLOWER_PAUSE_S]
    assert capsys.readouterr().err == "rank 1: error: shard 7 is gone\n"


RANK = """
import sys
from herd.run import cli, errors
cli.MAIN_PAUSE_S = cli.FOLLOWER_PAUSE_S = 0.0  # a launcher too slow to end the others in time
def body():
    raise {"data": errors.DataError, "stop": errors.Interrupted, "bug": ZeroDivisionError}[sys.argv[1]](sys.argv[2])
sys.exit(cli.main_guard(body))
"""


@pytest.mark.parametrize(("kind", "code", "line"), [("data", 4, "error: x"), ("stop", 75, "x"), ("bug", 1, None)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_what_all_ranks_meet_is_said_once_whoever_comes_first(
    kind: str, code: int, line: str | None, order: tuple[int, ...], tmp_path: Path
) -> None:
    said = []
    for rank in order:
        done = ended(rank, kind, "x", tmp_path)
        assert done.returncode == code
        said.append(done.stderr)
    assert said[1:] == ["", ""]
    if line is None:
        assert said[0].endswith("ZeroDivisionError: x\n") and said[0].count("Traceback") == 1
    else:
        assert said[0] == (f"{line}\n" if order[0] == 0 else f"rank 2: {line}\n")


def test_what_one_rank_meets_alone_is_said_beside_what_another_met(tmp_path: Path) -> None:
    assert ended(0, "data", "x", tmp_path).stderr == "error: x\n"
    assert ended(1, "data", "shard 7 is gone", tmp_path).stderr == "rank 1: error: shard 7 is gone\n"


def ended(rank: int, kind: str, text: str, temporary: Path) -> subprocess.CompletedProcess:
    """A rank that meets an error; this process is the launcher of all of them."""
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "3", "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", RANK, kind, text]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
