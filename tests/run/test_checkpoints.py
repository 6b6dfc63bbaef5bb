"""Checkpoint folders: complete or absent, every damaged byte found."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.run import checkpoints
from herd.run.errors import DataError, EnvironmentFault
from herd.run.resume import resolve

SAVE_FOR_EVER = """
import sys
from pathlib import Path
from herd.run import checkpoints
run, step = Path(sys.argv[1]), 0
while True:
    step += 1
    with checkpoints.writing(run, step, facts={}) as folder:
        for part in "ab":
            (folder / part).write_bytes(bytes([step % 256]) * 300_000)
    checkpoints.prune(run, keep=2)
    print(step, flush=True)
"""
TWO_RANKS = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from herd.run import checkpoints, ranks
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=ranks.rank(), world_size=2)
run = Path(sys.argv[1])
with checkpoints.writing(run, 3, facts={"zero": 2}) as folder:
    (folder / f"part.{ranks.rank()}").write_bytes(os.urandom(50_000))
found = checkpoints.latest(run)
checkpoints.verify(found)
ranks.barrier()
if ranks.is_main():
    (found / "part.1").write_bytes(b"x" * 50_000)
ranks.barrier()
try:
    checkpoints.verify(found)
except checkpoints.DataError as error:
    (run / f"seen.{ranks.rank()}").write_text(str(error))
ranks.shut_down()
"""


def save(run: Path, step: int, **contents: bytes) -> Path:
    with checkpoints.writing(run, step, facts={"zero": 1}) as folder:
        (folder / "model").mkdir()
        for name, content in ({"weights": b"w" * 1000, "state": b"s" * 10} | contents).items():
            (folder / "model" / name).write_bytes(content)
    return run / "checkpoints" / f"step_{step:06d}"


def test_a_checkpoint_holds_what_was_written_and_says_so(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert checkpoints.facts(path) == {"step": 12, "world_size": 1, "zero": 1}
    assert (checkpoints.latest(tmp_path), checkpoints.latest_step(tmp_path)) == (path, 12)
    marker = json.loads((path / "COMPLETE.json").read_text())
    assert {name: entry["bytes"] for name, entry in marker["files"].items()} == {
        "model/state": 10,
        "model/weights": 1000,
    }
    checkpoints.verify(path)
    assert [p.name for p in path.parent.iterdir()] == ["step_000012"]


def test_a_failed_save_leaves_no_trace_and_keeps_the_one_before(tmp_path: Path) -> None:
    before = save(tmp_path, 1)
    with pytest.raises(ZeroDivisionError), checkpoints.writing(tmp_path, 2, facts={}) as folder:
        (folder / "half").write_bytes(b"x")
        raise ZeroDivisionError
    assert [path.name for path in before.parent.iterdir()] == ["step_000001"]
    checkpoints.verify(before)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1, weights=b"old")
    path = save(tmp_path, 1, weights=b"new")
    assert (path / "model" / "weights").read_bytes() == b"new"
    checkpoints.verify(path)
    assert [p.name for p in path.parent.iterdir()] == ["step_000001"]


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 1009), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_found(place: int, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = save(tmp_path_factory.mktemp("run"), 1)
    target = path / "model" / ("weights" if place < 1000 else "state")
    content = bytearray(target.read_bytes())
    content[place % 1000] ^= 1 << bit
    target.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{target}: altered since it was written"):
        checkpoints.verify(path)


@pytest.mark.parametrize("length", [0, 1, 999])
def test_a_truncated_file_is_named_with_its_lengths(tmp_path: Path, length: int) -> None:
    path = save(tmp_path, 1)
    os.truncate(path / "model" / "weights", length)
    with pytest.raises(DataError, match=rf"model/weights: {length} bytes, 1000 were written"):
        checkpoints.verify(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "model" / "state").unlink()
    with pytest.raises(DataError, match=r"model/state: missing; name another"):
        checkpoints.verify(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3}'])
def test_a_damaged_marker_is_a_data_error(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    (path / "COMPLETE.json").write_text(text)
    with pytest.raises(DataError, match=r"COMPLETE\.json: damaged"):
        checkpoints.verify(path)


@pytest.mark.parametrize("delay_s", [0.0, 0.0009, 0.0037, 0.011, 0.029])
def test_whenever_a_save_is_killed_a_whole_checkpoint_is_there(tmp_path: Path, delay_s: float) -> None:
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        time.sleep(delay_s)
        child.send_signal(signal.SIGKILL)
        last = int([b"1", *child.stdout.read().split()][-1])
    checkpoints.clean(tmp_path)
    assert all(path.name.startswith("step_") for path in (tmp_path / "checkpoints").iterdir())
    found = resolve(tmp_path, "auto")
    assert checkpoints.step_of(found) in (last, last + 1)
    assert all(not checkpoints.verify(path) for path in checkpoints.all_complete(tmp_path))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 40, 300, 1_000_000):
        save(tmp_path, step)
    checkpoints.prune(tmp_path, keep=2)
    assert [checkpoints.step_of(path) for path in checkpoints.all_complete(tmp_path)] == [300, 1_000_000]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    checkpoints.prune(tmp_path, keep=5)
    assert checkpoints.latest_step(tmp_path) == 1_000_000


def test_later_checkpoints_than_the_one_gone_on_from_are_set_aside_and_never_taken_for_the_newest(
    tmp_path: Path,
) -> None:
    for step in (5, 40, 300):
        save(tmp_path, step)
    moved = checkpoints.set_aside_later(tmp_path / "checkpoints" / "step_000005")
    assert [path.name for path in moved] == ["set_aside_step_000040", "set_aside_step_000300"]
    save(tmp_path, 30)
    checkpoints.prune(tmp_path, keep=1)
    assert checkpoints.latest_step(tmp_path) == 30 and all(path.is_dir() for path in moved)


def test_leftovers_of_killed_saves_go_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".step_000002.tmp", ".step_000001.old", ".step_000000.trash", ".mine", "step_notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    checkpoints.clean(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_000001", ".mine", "step_notes"}


def test_a_save_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    marker = json.loads((path / "COMPLETE.json").read_text())
    marker["files"]["model/weights"]["bytes"] = 10**18
    (path / "COMPLETE.json").write_text(json.dumps(marker))
    with pytest.raises(EnvironmentFault, match=r"^the checkpoint of step 2 needs 1,050,000,000\.00 GB, .* free at"):
        checkpoints.begin(tmp_path, 2)


def test_a_run_that_was_only_set_up_has_nothing_to_lose_and_any_other_folder_has(tmp_path: Path) -> None:
    assert not checkpoints.never_stepped(tmp_path / "absent") and not checkpoints.never_stepped(tmp_path)
    for name in ("config.yaml", "run.json", "ds_config.teacher.json", "metrics.jsonl", "mlflow.json", ".mlflow.lock"):
        (tmp_path / name).touch()
    assert checkpoints.never_stepped(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert not checkpoints.never_stepped(tmp_path)
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert not checkpoints.never_stepped(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    save(tmp_path, 1)
    assert not checkpoints.never_stepped(tmp_path)


def test_two_ranks_write_hash_and_verify_one_checkpoint_together(tmp_path: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(tmp_path / "run"), str(tmp_path / "meeting")],
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    assert [child.wait() for child in children] == [0, 0]
    path = tmp_path / "run" / "checkpoints" / "step_000003"
    assert checkpoints.facts(path) == {"step": 3, "world_size": 2, "zero": 2}
    seen = {(tmp_path / "run" / f"seen.{rank}").read_text() for rank in range(2)}
    assert seen == {
        f"{path}/part.1: altered since it was written (SHA-256 differs); name another checkpoint, or --resume auto"
    }
