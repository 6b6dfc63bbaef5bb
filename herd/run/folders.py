"""Folders a user names: made, or found to be such as can be made, with one line where they are not.

check_folder(out, "--out")          # early, in a dry run too: touches nothing
make_folder(out, "--out")           # when there is something to put there
with claimed(run_folder, "run.name"): ...      # nobody else works in it meanwhile
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from herd.run.errors import ConfigError, EnvironmentFault

PATIENCE_S = 30.0  # a stopped run's ranks may need as long to end
GLANCE_S = 0.2


@contextmanager
def claimed(folder: Path, field: str, *, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Keep other processes that claim `folder` out of it; a lock file lies beside it meanwhile.

    The kernel drops the lock with the process, so a kill leaves no stale one. Raises EnvironmentFault when another
    process has not left the folder after `patience_s` seconds.
    """
    make_folder(folder.parent, field)
    path = folder.with_name(f".{folder.name}.claim")  # a study has a .lock of its own beside its trials
    until = time.monotonic() + patience_s
    while (descriptor := _try_lock(path, field)) is None:
        if time.monotonic() > until:
            raise EnvironmentFault(f"{field}: another process is at work in {folder}; wait for it, or set another name")
        time.sleep(GLANCE_S)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _try_lock(path: Path, field: str) -> int | None:
    """A descriptor that holds the lock file, None while another process does."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError as error:
        raise EnvironmentFault(f"{field}: {path.parent} cannot be written to; set another {field}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):  # held; or removed by its holder since it was opened
        pass
    os.close(descriptor)
    return None


def make_folder(folder: Path, field: str) -> None:
    """Make a folder and those above it. Raises ConfigError where a file is in the way, else EnvironmentFault."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise _file_in_the_way(error.filename, field) from error
    except OSError as error:
        raise EnvironmentFault(f"{field}: {folder} cannot be made ({error.strerror}); set another {field}") from error


def check_folder(folder: Path, field: str) -> None:
    """Raise what `make_folder` most likely would, without making anything."""
    folder = folder.absolute()
    try:
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
    except OSError as error:  # a name that is too long
        raise EnvironmentFault(f"{field}: {folder} cannot be made ({error.strerror}); set another {field}") from error
    if not nearest.is_dir():
        raise _file_in_the_way(nearest, field)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise EnvironmentFault(f"{field}: {nearest} cannot be written to; set another {field}")


def _file_in_the_way(path: str | Path, field: str) -> ConfigError:
    return ConfigError(f"{field}: {path} is a file, not a folder; set another {field}")
