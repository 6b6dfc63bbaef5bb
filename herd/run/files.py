"""Writes that are whole or absent: temporary name in the same folder, fsync, rename. A full disk is the user's error.

write_atomic(run_folder / "config.yaml", text)
replace_folder(run_folder / ".scout.tmp", run_folder / "scout")
"""

import ctypes
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from herd.run.errors import EnvironmentFault

GB = 1e9
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit is reached",
}
# torch and safetensors write from C++ and Rust: the errno survives only in the text, or not at all.
NO_ROOM_TEXT = re.compile(r"No space left on device|os error 28\b|PytorchStreamWriter failed|inline_container\.cc")
AT_FDCWD, RENAME_EXCHANGE = -100, 2
NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old content or the new, never a part.

    Raises EnvironmentFault when the disk is full; nothing is left behind then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_faults(path), temporary.open("wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in the place of `final`, which is deleted if it exists; both on one file system.

    Every file is flushed first. Where the kernel can exchange two names at once (Linux, local file systems) `final`
    is whole at every moment; elsewhere it is absent for the time between two renames.
    """
    with disk_faults(temporary):
        for path in sorted(temporary.rglob("*")):
            sync_folder(path) if path.is_dir() else sync_file(path)
        sync_folder(temporary)
    if not final.exists():
        os.rename(temporary, final)
        sync_folder(final.parent)
        return
    old = temporary
    if not exchange(temporary, final):
        old = final.with_name(f".{final.name}.old")
        if old.exists():
            shutil.rmtree(old)
        os.rename(final, old)
        os.rename(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(old)


def fresh_folder(folder: Path) -> Path:
    """Make `folder` anew and empty; what a killed writer left in it goes."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (renameat2 with RENAME_EXCHANGE); False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        renameat2 = libc.renameat2
    except AttributeError:  # not Linux, or a C library before 2.28
        return False
    if renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk, whichever process wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, so that a rename in it survives a power cut."""
    sync_file(folder)


def require_space(folder: Path, needed: int, *, what: str) -> None:
    """Raise EnvironmentFault unless `needed` bytes are free where `folder` lies (or its nearest existing parent)."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise EnvironmentFault(
            f"{what} needs {needed / GB:,.2f} GB, {free / GB:,.2f} GB free at {place}; free some, or move run.folder"
        )


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turn a full disk met inside, also by torch.save or safetensors, into an EnvironmentFault that names `path`."""
    try:
        yield
    except Exception as error:
        cause = no_room(error)
        if cause is None:
            raise
        raise EnvironmentFault(f"cannot write {path}: {cause}; free some space there, or move run.folder") from error


def no_room(error: Exception) -> str | None:
    """What stopped a write, when it was want of space; None for every other error."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return NO_ROOM[error.errno]
    return NO_ROOM[errno.ENOSPC] if NO_ROOM_TEXT.search(str(error)) else None
