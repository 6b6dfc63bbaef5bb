"""The queue between a run and MLflow: a file of events that outlives the process.

    journal = Journal(folder)               # <folder>/mlflow_pending.jsonl
    journal.append({"do": "metrics", ...})  # the caller: one short write, tens of microseconds, never waits for a store
    for end, event in journal.events(0): ...; journal.remove_if_read(end)      # the sender

The file exists only while something in it is unsent. Any process may append, one at a time may read.
"""

import fcntl
import json
import os
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE = "mlflow_pending.jsonl"
NAMELESS = "nameless"


class Journal:
    """Append-before-send log of one run folder. Its first line names it, so that a remembered offset into a file
    that was sent and removed meanwhile is never applied to its successor."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        self._warned = False

    def append(self, event: dict[str, Any]) -> None:
        """Add `event`. A disk that refuses costs the event and one warning, never the run.

        Where the folder itself is gone nothing is said: whoever works in it stops on that, and says so.
        """
        line = (json.dumps(event, default=str) + "\n").encode()
        try:
            with self._lock, self._locked() as descriptor:
                size = os.fstat(descriptor).st_size
                lead = b"" if size else json.dumps({"journal": uuid.uuid4().hex[:12]}).encode() + b"\n"
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    lead = b"\n"  # a writer died inside its line: close it, the reader skips it
                if os.write(descriptor, lead + line) != len(lead + line):
                    os.ftruncate(descriptor, size)
                    raise OSError("the line was written in part")
        except OSError as error:
            if not self._warned and self.path.parent.is_dir():
                print(f"warning: {self.path} cannot be written ({error}); MLflow will miss events", file=sys.stderr)
            self._warned = True

    def name(self) -> str | None:
        """What the first line says, None when nothing is pending."""
        try:
            with self.path.open("rb") as file:
                first = file.readline()
            return json.loads(first).get("journal", NAMELESS) if first else None  # made, not written yet
        except FileNotFoundError:
            return None
        except ValueError:  # its first writer died on the first line
            return NAMELESS

    def events(self, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Lines after byte `offset` of a file that is there, up to its present end, each with the offset behind it.

        The file's first line, and one torn by a writer's death (reported), come as {}.
        """
        with self._lock, self._locked() as descriptor:
            end = os.fstat(descriptor).st_size  # under the lock nobody is inside a line
        with self.path.open("rb") as file:
            file.seek(offset)
            while offset < end and (line := file.readline()):
                offset += len(line)
                try:
                    event = json.loads(line)
                except ValueError:
                    print(f"warning: {self.path}: left out a torn line before byte {offset}", file=sys.stderr)
                    event = {}
                yield offset, event if "do" in event else {}

    def remove_if_read(self, offset: int) -> bool:
        """Remove the file when it ends at `offset`; False when more was appended meanwhile."""
        with self._lock, self._locked() as descriptor:
            if os.fstat(descriptor).st_size > offset:
                return False
            self.path.unlink()  # under the lock: who appends next sees the link count and starts a new file
            return True

    def close(self) -> None:
        """Give the file descriptor back; appending opens it again."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file, open and locked against other processes for the few microseconds of a write."""
        while True:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            if os.fstat(self._descriptor).st_nlink:
                break
            os.close(self._descriptor)  # removed by a sender since
            self._descriptor = None
        try:
            yield self._descriptor
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
