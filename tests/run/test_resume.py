"""What a run starts from: every value of --resume over whole, incomplete and damaged checkpoints."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from herd.run import checkpoints
from herd.run.errors import ConfigError, DataError
from herd.run.resume import resolve


def save(run: Path, step: int) -> Path:
    with checkpoints.writing(run, step, facts={"zero": 1}) as folder:
        (folder / "weights").write_bytes(b"w" * 1000)
    return run / "checkpoints" / f"step_{step:06d}"


def lose_marker(checkpoint: Path) -> None:
    (checkpoint / "COMPLETE.json").unlink()


def damage_marker(checkpoint: Path) -> None:
    (checkpoint / "COMPLETE.json").write_text('{"files"')


def cut_weights(checkpoint: Path) -> None:
    os.truncate(checkpoint / "weights", 7)


LOSSES = {
    lose_marker: ": no COMPLETE.json, so it never was complete",
    damage_marker: "/COMPLETE.json: damaged",
    cut_weights: "/weights: 7 bytes, 1000 were written",
}


def test_never_wants_an_empty_folder_and_says_how_to_go_on(tmp_path: Path) -> None:
    assert resolve(tmp_path / "absent", "never") is None
    assert resolve(tmp_path, "never") is None
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"is not empty: go on with it by --resume auto, or start another with --set"):
        resolve(tmp_path, "never")


def test_auto_starts_fresh_where_latest_refuses(tmp_path: Path) -> None:
    assert resolve(tmp_path, "auto") is None
    with pytest.raises(ConfigError, match=r"^--resume latest: .* no checkpoint; --resume auto starts fresh"):
        resolve(tmp_path, "latest")
    newest = [save(tmp_path, step) for step in (9, 10)][-1]
    assert resolve(tmp_path, "auto") == resolve(tmp_path, "latest") == newest


@pytest.mark.parametrize("lose", LOSSES)
@pytest.mark.parametrize("which", ["auto", "latest"])
def test_a_newest_checkpoint_that_is_not_whole_is_passed_over_aloud(
    tmp_path: Path, which: str, lose: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    lose(bad)
    assert resolve(tmp_path, which) == good
    assert capsys.readouterr().err == f"warning: checkpoint passed over: {bad}{LOSSES[lose]}\n"
    with pytest.raises(DataError, match=LOSSES[lose]):
        resolve(tmp_path, str(bad))


def test_an_older_checkpoint_that_is_not_whole_is_no_news(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lose_marker(save(tmp_path, 1))
    newest = save(tmp_path, 2)
    assert resolve(tmp_path, "latest") == newest
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("lose", LOSSES)
def test_latest_names_every_checkpoint_that_is_not_whole_and_the_mend(
    tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    found = [save(tmp_path, step) for step in (1, 2)]
    for checkpoint in found:
        lose(checkpoint)
    with pytest.raises(DataError) as caught:
        resolve(tmp_path, "latest")
    line = str(caught.value)
    assert line.startswith(f"--resume latest: no checkpoint of {tmp_path} is whole (")
    assert all(f"{checkpoint}{LOSSES[lose]}" in line for checkpoint in found)
    assert "\n" not in line and "put its files back from a copy, start another run with --set run.name=NEW" in line


def test_auto_starts_over_aloud_where_no_checkpoint_ever_was_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save(tmp_path, 1)
    lose_marker(checkpoint)
    assert resolve(tmp_path, "auto") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert str(checkpoint) in line and line.endswith("there is no other, so the run starts from its first step")


@pytest.mark.parametrize("lose", [damage_marker, cut_weights])
def test_auto_does_not_start_over_where_a_checkpoint_was_complete_once(
    tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    lose(save(tmp_path, 1))
    with pytest.raises(DataError, match=r"^--resume auto: no checkpoint of .* is whole"):
        resolve(tmp_path, "auto")


@pytest.mark.parametrize("lose", [damage_marker, lose_marker])
def test_a_run_that_passed_over_a_checkpoint_saves_the_next_ones(tmp_path: Path, lose: Callable[[Path], None]) -> None:
    save(tmp_path, 1)
    lose(save(tmp_path, 3))
    assert resolve(tmp_path, "auto") == checkpoints.latest(tmp_path)
    save(tmp_path, 2)
    assert checkpoints.latest_step(tmp_path) == 2
    save(tmp_path, 3)
    assert checkpoints.latest_step(tmp_path) == 3


def test_a_named_checkpoint_is_taken_from_this_run_or_into_an_empty_one(tmp_path: Path) -> None:
    older, _ = save(tmp_path / "a", 1), save(tmp_path / "a", 2)
    assert resolve(tmp_path / "a", str(older)) == older
    assert resolve(tmp_path / "new", str(older)) == older
    save(tmp_path / "b", 1)
    with pytest.raises(ConfigError, match=r"of another run, and .*b is not empty"):
        resolve(tmp_path / "b", str(older))


@pytest.mark.parametrize(
    "wrong",
    ["a", "a/checkpoints", "a/checkpoints/step_000009", "a/checkpoints/step_000001/model", "a/step_000001", "", "b/x"],
)
def test_a_wrong_path_shows_the_complete_checkpoints_near_it(tmp_path: Path, wrong: str) -> None:
    steps = [save(tmp_path / "a", step) for step in (1, 2, 30)]
    lose_marker(save(tmp_path / "a", 40))
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path / "new", str(tmp_path / wrong))
    assert str(caught.value).endswith(f"; complete there: {steps[2]}, {steps[1]}, {steps[0]}")
    assert "new" not in str(caught.value)


def test_a_wrong_path_far_from_any_checkpoint_shows_the_runs_own_or_says_there_are_none(tmp_path: Path) -> None:
    elsewhere = tmp_path / "else" / "where" / "deep"
    elsewhere.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no complete checkpoint is near it; --resume takes a checkpoint's path or"):
        resolve(tmp_path / "a", str(elsewhere))
    steps = [save(tmp_path / "a", step) for step in range(1, 6)]
    with pytest.raises(ConfigError, match=rf"complete there: {steps[4]}, {steps[3]}, {steps[2]} and 2 more$"):
        resolve(tmp_path / "a", str(elsewhere))


def test_a_mistyped_word_is_told_from_a_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--resume lastest: no such folder; did you mean latest\?$"):
        resolve(tmp_path, "lastest")
