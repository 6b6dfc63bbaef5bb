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

from herd.run.errors import DiskFull, HerdError

GB = 1e9
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit is reached",
}
# torch and safetensors write from C++ and Rust: the errno survives only in the text, or not at all.
NO_ROOM_TEXT = re.compile(
    r"No space left on device|os error 28\b|PytorchStreamWriter failed|inline_container\.cc|database or disk is full"
)
AT_FDCWD, RENAME_EXCHANGE = -100, 2
NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}


def source_root() -> Path:
    """The folder that herd and its neighbours are imported from: a checkout, or site-packages.

    Not `herd.__file__`: started from the folder above a clone named herd, Python takes the clone for the package.
    """
    return Path(__file__).resolve().parents[2]


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old content or the new, never a part.

    Raises DiskFull when there is no room; nothing is left behind then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        content = data.encode() if isinstance(data, str) else data
        with disk_faults(path, needed=len(content)), temporary.open("wb") as stream:
            stream.write(content)
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
    with disk_faults(final):
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
    """Raise DiskFull unless `needed` bytes are free where `folder` lies (or its nearest existing parent)."""
    place, free = _free(folder)
    if free < needed:
        raise DiskFull(f"{what} needs {size(needed)}, {size(free)} free at {place}; free some", folder)


def _free(path: Path) -> tuple[Path, int]:
    """The nearest existing folder above `path`, or itself, and the bytes free there."""
    place = Path(path).absolute()
    while not place.is_dir():
        place = place.parent
    return place, shutil.disk_usage(place).free


def size(num_bytes: int) -> str:
    """0.5 kB, 12.3 MB, 1,234.56 GB (decimal units)."""
    if num_bytes >= GB:
        return f"{num_bytes / GB:,.2f} GB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def disk_faults(path: Path, *, needed: int | None = None, mend: str = "") -> Iterator[None]:
    """Turn a full disk met inside, also by torch.save or safetensors, into a DiskFull that names `path`.

    `needed`: bytes being written, where known. `mend`: what helps besides free space, for a disk that is full at
    `path` or below; whoever knows the command gives it, around what may name the place more closely.
    """
    try:
        yield
    except Exception as error:
        full = full_disk(error, path, needed=needed)
        if full is None:
            raise
        inside = full.place is not None and full.place.absolute().is_relative_to(path.absolute())
        raise DiskFull(f"{full}, or {mend}" if mend and inside else str(full), full.place) from error


def full_disk(error: Exception, path: Path | None = None, *, needed: int | None = None) -> DiskFull | None:
    """The DiskFull that an error met while writing `path` amounts to; None for every other error."""
    if isinstance(error, DiskFull):
        return error
    cause = None if isinstance(error, HerdError) else no_room(error)
    if cause is None:
        return None
    named = Path(error.filename) if isinstance(error, OSError) and isinstance(error.filename, str) else None
    beside = path is not None and named is not None and named.absolute().is_relative_to(path.absolute().parent)
    place = named if named is not None and not beside else path
    if place is None:
        return DiskFull(f"{cause}; free some space", None)
    folder, free = _free(place)
    facts = [] if needed is None else [f"{size(needed)} to write"]
    if cause == NO_ROOM[errno.ENOSPC]:  # a quota or a limit is not what the disk has
        facts.append(f"{size(free)} free" + ("" if folder == place.absolute() else f" at {folder}"))
    shown = f" ({', '.join(facts)})" if facts else ""
    return DiskFull(f"cannot write {place}: {cause}{shown}; free some space there", place)


def no_room(error: BaseException) -> str | None:
    """What stopped a write, when it was want of space (of this error or of its causes); None for every other error."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return NO_ROOM[error.errno]
    if NO_ROOM_TEXT.search(str(error)):
        return NO_ROOM[errno.ENOSPC]
    return None if error.__cause__ is None else no_room(error.__cause__)
