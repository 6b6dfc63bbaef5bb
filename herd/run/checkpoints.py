"""Checkpoint folders: written aside by all ranks, complete or absent, every file hashed. Nothing of DeepSpeed here.

    with checkpoints.writing(run_folder, step, facts={"zero": 1}) as folder: ...     every rank writes its files in it
    checkpoints.verify(checkpoints.latest(run_folder))                               (`herd.run.resume` chooses one)

checkpoints/step_000123/COMPLETE.json {"step", "world_size", <facts>, "files": {name: {"bytes", "sha256"}}}
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from herd.run import files, ranks
from herd.run.errors import DataError

MARKER = "COMPLETE.json"
FOLDER = "checkpoints"
NAME = re.compile(r"step_(\d+)")
LEFTOVER = re.compile(r"\.step_\d+\.(tmp|old|trash)")
BEFORE_A_STEP = re.compile(r"config\.yaml|run\.json|ds_config\..*\.json|\.?mlflow.*|metrics\.jsonl|checkpoints")
ROOM = 1.05  # of the last checkpoint's size must be free before the next one starts


@contextmanager
def writing(run_folder: Path, step: int, *, facts: Mapping[str, Any]) -> Iterator[Path]:
    """`begin`, then `complete`; on an error the half-written folder goes. A full disk is a DiskFull."""
    folder = begin(run_folder, step)
    try:
        with files.disk_faults(folder):
            yield folder
            complete(folder, facts=facts)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def begin(run_folder: Path, step: int) -> Path:
    """The empty folder in which every rank writes its part of this step's checkpoint; a collective call.

    Raises DiskFull when less is free than the last checkpoint took.
    """
    folder = run_folder / FOLDER / f".step_{step:06d}.tmp"
    if ranks.is_main():
        last = latest(run_folder)
        if last is not None:
            took = sum(entry["bytes"] for entry in _marker(last)["files"].values())
            files.require_space(run_folder, int(ROOM * took), what=f"the checkpoint of step {step}")
        files.fresh_folder(folder)
    ranks.barrier()
    return folder


def complete(folder: Path, *, facts: Mapping[str, Any]) -> Path:
    """Flush and hash every file (each rank its share), write the marker, rename into place; a collective call.

    Until the rename, which comes last, the checkpoint does not exist. Returns the final folder.
    """
    ranks.barrier()
    names = json.loads(ranks.broadcast_text(json.dumps(sorted(_names(folder)))))
    digests_F32 = torch.zeros(len(names), 32, dtype=torch.int64)  # bytes of SHA-256, a file a row
    for index in range(ranks.rank(), len(names), ranks.world_size()):
        files.sync_file(folder / names[index])
        digests_F32[index] = torch.tensor(list(bytes.fromhex(files.sha256(folder / names[index]))))
    digests_F32 = ranks.all_reduce_sum(digests_F32)
    final = folder.with_name(folder.name.removeprefix(".").removesuffix(".tmp"))
    if ranks.is_main():
        entries = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": bytes(digest).hex()}
            for name, digest in zip(names, digests_F32.tolist(), strict=True)
        }
        marker = {"step": step_of(final), "world_size": ranks.world_size(), **facts, "files": entries}
        files.write_atomic(folder / MARKER, json.dumps(marker, indent=1) + "\n")
        files.replace_folder(folder, final)
    ranks.barrier()
    return final


def _names(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(NAME.fullmatch(checkpoint.name).group(1))


def all_folders(run_folder: Path) -> list[Path]:
    """Every checkpoint's folder, complete or not, oldest first."""
    found = (run_folder / FOLDER).glob("step_*")
    return sorted((path for path in found if NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def all_complete(run_folder: Path) -> list[Path]:
    """Checkpoints with a completeness marker that can be read, oldest first."""
    return [path for path in all_folders(run_folder) if is_complete(path)]


def is_complete(checkpoint: Path) -> bool:
    """True when the folder's marker can be read; its other files are not looked at."""
    try:
        _marker(checkpoint)
    except DataError:
        return False
    return True


def latest(run_folder: Path) -> Path | None:
    """The newest complete checkpoint; its files are not read."""
    return next(reversed(all_complete(run_folder)), None)


def latest_step(run_folder: Path) -> int | None:
    """Its step."""
    newest = latest(run_folder)
    return None if newest is None else step_of(newest)


def facts(checkpoint: Path) -> dict[str, Any]:
    """Step, world size and the caller's own facts of a complete checkpoint. Raises DataError without a good marker."""
    return {key: value for key, value in _marker(checkpoint).items() if key != "files"}


def _marker(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MARKER
    try:
        marker = json.loads(path.read_text())
        marker["files"].items()
    except FileNotFoundError:
        raise DataError(
            f"{checkpoint}: no {MARKER}, so it never was complete; name another, or --resume auto"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: damaged; name another checkpoint, or --resume auto") from None
    return marker


def verify(checkpoint: Path) -> None:
    """Raise DataError naming the first file that is missing, truncated or altered; a collective call."""
    entries = sorted(_marker(checkpoint)["files"].items())
    faults_F = torch.zeros(len(entries), dtype=torch.int64)
    for index in range(ranks.rank(), len(entries), ranks.world_size()):
        name, entry = entries[index]
        faults_F[index] = _fault(checkpoint / name, entry) is not None
    found = ranks.all_reduce_sum(faults_F).nonzero().flatten().tolist()
    if found:
        name, entry = entries[found[0]]
        fault = _fault(checkpoint / name, entry) or "other bytes on another rank"
        raise DataError(f"{checkpoint / name}: {fault}; name another checkpoint, or --resume auto")


def _fault(path: Path, entry: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{size} bytes, {entry['bytes']} were written"
        return None if files.sha256(path) == entry["sha256"] else "altered since it was written (SHA-256 differs)"
    except OSError as error:
        return "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"


def prune(run_folder: Path, *, keep: int) -> None:
    """Delete all complete checkpoints but the newest `keep`; rank 0 does it."""
    if not ranks.is_main():
        return
    for old in all_complete(run_folder)[:-keep]:
        trash = old.with_name(f".{old.name}.trash")
        old.rename(trash)  # a half-deleted checkpoint must not look complete
        shutil.rmtree(trash)


def set_aside_later(checkpoint: Path) -> list[Path]:
    """Rename the checkpoints of steps after the one a run goes on from; rank 0 does it. Returns the new paths.

    Left in place they would be taken for the newest, and what is saved from here on pruned as the older.
    """
    moved = []
    for later in all_folders(checkpoint.parents[1]):
        if step_of(later) > step_of(checkpoint):
            moved.append(later.with_name(f"set_aside_{later.name}"))
            if moved[-1].exists():
                shutil.rmtree(moved[-1])
            later.rename(moved[-1])
    return moved


def clean(run_folder: Path) -> None:
    """Remove what killed saves and deletions left; rank 0 calls it before a run starts."""
    for path in (run_folder / FOLDER).glob(".step_*"):
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def never_stepped(run_folder: Path) -> bool:
    """True for the folder of a run that was set up and took no step: there is nothing in it to lose."""
    names = [path.name for path in run_folder.iterdir()] if run_folder.is_dir() else []
    metrics = run_folder / "metrics.jsonl"
    set_up_only = "config.yaml" in names and all(BEFORE_A_STEP.fullmatch(name) for name in names)
    return set_up_only and not all_complete(run_folder) and not (metrics.exists() and metrics.stat().st_size)
