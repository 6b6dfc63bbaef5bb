"""Where an export goes, and where it is made until it is whole. No torch, so that a command can ask before its imports.

check_target(Path("exports/scout-int4"))           # not there yet
unfinished(path)                                   # exports/.scout-int4.incomplete
with making(path): ...                             # by one command at a time
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from herd.run.errors import ConfigError
from herd.run.folders import check_folder, make_folder

NAME_BYTES = 255
"""What file systems allow."""
REPORT = "gate.json"
LOCK = "lock"


def check_target(path: Path) -> None:
    """Raise ConfigError when something is already there: an export is never overwritten.

    Beside a whole export nothing unfinished is of use: what a command left that was killed just after its end goes.
    """
    _check_place(path)
    if not path.exists():
        return
    if (path / REPORT).is_file() and unfinished(path).is_dir():
        with making(path):
            shutil.rmtree(unfinished(path))
    raise ConfigError(f"out = {path}: exists; remove it or choose another folder")


def _check_place(path: Path) -> None:
    """Raise ConfigError or EnvironmentFault for a name that no folder can have there."""
    if path.name in ("", ".."):
        raise ConfigError(f"out = {str(path)!r}: names no folder that can be made; give it a name of its own")
    longest = NAME_BYTES - len(os.fsencode(unfinished(path).name)) + len(os.fsencode(path.name))
    if len(os.fsencode(path.name)) > longest:
        raise ConfigError(f"out = {path}: its name has more than {longest} bytes; choose a shorter one")
    check_folder(path.parent, "out")
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"out = {path}: a link to {os.readlink(path)}, which does not exist; remove the link")


@contextmanager
def making(path: Path) -> Iterator[None]:
    """Hold `unfinished(path)`, which is made if need be; ConfigError while another command holds it.

    The kernel frees the lock when its holder dies, however it dies.
    """
    with _open_lock(unfinished(path) / LOCK):
        yield


def _open_lock(file: Path) -> IO[str]:
    """The locked file, still under its name: the holder before may have removed it with its folder."""
    while True:
        make_folder(file.parent, "out")
        stream = file.open("w")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(file.stat(), os.fstat(stream.fileno())):
                return stream
        except BlockingIOError:
            stream.close()
            place = file.parent
            mend = "wait for it, or choose another --out"
            raise ConfigError(f"{place}: another command is working there; {mend}") from None
        stream.close()


def unfinished(path: Path) -> Path:
    """The folder beside it in which an export is made."""
    return path.with_name(f".{path.name}.incomplete")


def finished_layers(path: Path) -> Path:
    """Where a calibrated method keeps the layers it has finished, for a command that is started again."""
    return unfinished(path) / "layers"


def can_go_on(path: Path) -> bool:
    """Whether any layer is finished there (`quant.calibration.ledger` names the files)."""
    return any(finished_layers(path).glob("layer-*.json"))
