"""Last words of a launch: of the ranks of one machine that end with the same line, the first says it.

if last_words.first(line): print(line, file=sys.stderr)

What was said stands in a file of the temporary folder, named after the user and the launcher.
"""

import fcntl
import hashlib
import os
import tempfile
import time
from pathlib import Path

from herd.run import launcher

CLOCKS_DIFFER_S = 2.0  # between a process's recorded start and the wall clock


def first(line: str) -> bool:
    """True unless another rank that this rank's launcher started has called with the same line; always True alone."""
    if launcher.world_size() == 1:
        return True
    import psutil

    started = psutil.Process().create_time() - CLOCKS_DIFFER_S
    digest = hashlib.sha256(line.encode()).hexdigest()
    try:
        with _file_of(os.getppid()).open("a+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            said = dict(entry.split() for entry in stream)
            # A parent may outlive its launch (a shell): what was said before this rank existed is another launch's.
            if float(said.get(digest, 0)) >= started:
                return False
            stream.write(f"{digest} {time.time()}\n")
    except (OSError, ValueError):  # no room, not ours, damaged: better said twice than never
        return True
    _forget_ended_launches()
    return True


def _file_of(parent: int | str) -> Path:
    return Path(tempfile.gettempdir()) / f"herd-{os.getuid()}-{parent}.said"


def _forget_ended_launches() -> None:
    import psutil

    for path in _file_of("").parent.glob(_file_of("*").name):
        if not psutil.pid_exists(int(path.stem.rpartition("-")[2])):
            path.unlink(missing_ok=True)
