"""Which checkpoint a run starts from: what `--resume` says, and what there is. No step is taken here.

resume_from = resume.resolve(run_folder, "auto")         None: start fresh
"""

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

from herd.run import checkpoints, ranks
from herd.run.errors import ConfigError, DataError

WORDS = ("auto", "latest", "never")
NEARBY = ("", "checkpoints/", "*/checkpoints/")  # where checkpoints may lie, seen from a wrong path's nearest folder
SHOWN = 3


def resolve(run_folder: Path, which: str) -> Path | None:
    """The verified checkpoint to start from, None for a fresh start; a collective call, the same on every rank.

    `never`: fresh, and only into an empty folder. `auto`: the newest whole one, fresh when none ever was complete.
    `latest`: the same, but one must exist. Anything else is a checkpoint's path. Incomplete and damaged ones are
    passed over with a line on stderr, unless named. Raises ConfigError for what does not fit the folder, DataError
    for damage.
    """
    if which == "never":
        if run_folder.is_dir() and any(run_folder.iterdir()):
            raise ConfigError(
                f"{run_folder} is not empty: go on with it by --resume auto, or start another with --set run.name=NEW"
            )
        return None
    if which not in WORDS:
        return _named(run_folder, Path(which))
    found = checkpoints.all_folders(run_folder)
    faults = {}
    while found and (fault := _fault(found[-1])) is not None:
        faults[found.pop()] = fault
    if not found:
        _check_fresh_start(run_folder, which, faults)
    if ranks.is_main():
        for fault in faults.values():
            instead = "" if found else "; there is no other, so the run starts from its first step"
            print(f"warning: checkpoint passed over: {fault}{instead}", file=sys.stderr, flush=True)
    return found[-1] if found else None


def _fault(checkpoint: Path) -> str | None:
    try:
        checkpoints.verify(checkpoint)
    except DataError as error:
        return str(error).partition(";")[0]
    return None


def _check_fresh_start(run_folder: Path, which: str, faults: dict[Path, str]) -> None:
    """Refuse to begin anew where a checkpoint is wanted, or where one was complete before it was damaged."""
    if faults and (which == "latest" or any((path / checkpoints.MARKER).exists() for path in faults)):
        raise DataError(
            f"--resume {which}: no checkpoint of {run_folder} is whole ({'; '.join(faults.values())}); put its files "
            f"back from a copy, start another run with --set run.name=NEW, or delete {run_folder / checkpoints.FOLDER} "
            "and start this one again with --resume auto"
        )
    if which == "latest":
        raise ConfigError(f"--resume latest: {run_folder} holds no checkpoint; --resume auto starts fresh then")


def _named(run_folder: Path, path: Path) -> Path:
    if not path.is_dir() or checkpoints.NAME.fullmatch(path.name) is None:
        cause = "is no checkpoint" if path.is_dir() else "no such folder"
        near = difflib.get_close_matches(str(path), WORDS, n=1)
        mend = f"did you mean {near[0]}?" if near and not path.exists() else _instead(run_folder, path)
        raise ConfigError(f"--resume {path}: {cause}; {mend}")
    inside = path.resolve().is_relative_to(run_folder.resolve())
    if not inside and run_folder.is_dir() and any(run_folder.iterdir()):
        raise ConfigError(
            f"--resume {path}: of another run, and {run_folder} is not empty; start a new one with --set run.name=NEW"
        )
    checkpoints.verify(path)
    return path


def _instead(run_folder: Path, path: Path) -> str:
    """Complete checkpoints near a wrong path, else this run's own, else what --resume takes."""
    places = [place for place in (path, *path.parents) if place.is_dir()][:2]
    near = (sorted(_complete_near(place), key=checkpoints.step_of) for place in places)
    there = next(filter(None, near), None) or checkpoints.all_complete(run_folder)
    if not there:
        return f"no complete checkpoint is near it; --resume takes a checkpoint's path or one of {', '.join(WORDS)}"
    more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
    return f"complete there: {', '.join(map(str, reversed(there[-SHOWN:])))}{more}"


def _complete_near(place: Path) -> Iterator[Path]:
    for above in NEARBY:
        for checkpoint in place.glob(f"{above}step_*"):
            if checkpoints.NAME.fullmatch(checkpoint.name) and checkpoints.is_complete(checkpoint):
                yield checkpoint
