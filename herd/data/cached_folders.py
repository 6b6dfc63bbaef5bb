"""Folders of `.cache/` that are built once, whole and verified, however many processes ask at the same time.

folder = build_once(cache / "tokenizers" / digest, build, what="tokenizer")      build(empty folder) fills it
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from herd.run.errors import EnvironmentFault
from herd.run.files import disk_faults, fresh_folder, replace_folder, sha256, write_atomic

MANIFEST = "manifest.json"
PATIENCE_S = 10.0

log = logging.getLogger(__name__)


def build_once(folder: Path, build: Callable[[Path], None], *, what: str) -> Path:
    """Return `folder`, filled by `build` unless a complete one is there.

    A folder that does not match its own manifest is reported and built again. Raises EnvironmentFault when the cache
    cannot be written; whatever `build` raises leaves nothing behind.
    """
    if _fault(folder) is None:
        return folder
    try:
        with disk_faults(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = _acquire(folder.with_name(f"{folder.name}.lock"), what)
    except OSError as fault:
        raise EnvironmentFault(
            f"cannot write the {what} to {folder.parent} ({fault.strerror}); make that folder writable"
        ) from fault
    try:
        fault = _fault(folder)  # another process may have built it while this one waited
        if fault is not None:
            if folder.exists():
                log.warning("cached %s in %s is damaged (%s): building it again", what, folder, fault)
            _build(folder, build)
    finally:
        lock.release()
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    # A killed process may have left this folder half full; the lock says nobody is at work in it.
    building = fresh_folder(folder.with_name(f"{folder.name}.building"))
    try:
        with disk_faults(folder):
            build(building)
        files = {path.name: _facts(path) for path in sorted(building.iterdir())}
        write_atomic(building / MANIFEST, json.dumps(files, indent=1))
        replace_folder(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _acquire(path: Path, what: str) -> FileLock:
    """Lock, with a word when another process makes this one wait. The system frees the lock of a killed process."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=PATIENCE_S)
    except Timeout:
        log.warning("waiting for another process that is building the %s (lock %s)", what, path)
        lock.acquire()
    return lock


def _fault(folder: Path) -> str | None:
    """What is wrong with a built folder, or None when every file is as its manifest says."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        for name, facts in files.items():
            if _facts(folder / name) != facts:
                return f"{name} was changed or cut short"
    except (OSError, ValueError) as fault:
        return f"{type(fault).__name__}: {fault}"
    return None


def _facts(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
