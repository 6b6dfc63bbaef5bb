"""Runs a command and sees to it that nothing of it outlives the one who asked.

    python sweeps/guard.py LOCK command ...          (started by sweeps.trial, which holds its stdin open)

When stdin closes, because the worker stopped the trial or died, every process of the command gets SIGTERM, and SIGKILL
30 s later. Holds LOCK meanwhile: whoever goes on with the same run waits until this one is gone. Standard library only.
"""

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time

GRACE_S = 30.0
GLANCE_S = 0.1


def main(lock: str, command: list[str]) -> int:
    """Run the command; returns its exit code, negative for a signal."""
    with open(lock, "a") as file:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if _closed(GLANCE_S):
                return 75
        # A session of its own holds the launcher and every rank it starts.
        child = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
        stopping: float | None = None
        while child.poll() is None:
            if stopping is None and _closed(GLANCE_S):
                stopping = time.monotonic()
                signal_session(child.pid, signal.SIGTERM)
            elif stopping is not None:
                time.sleep(GLANCE_S)
                if time.monotonic() - stopping > GRACE_S:
                    signal_session(child.pid, signal.SIGKILL)
        signal_session(child.pid, signal.SIGKILL)  # ranks a dead launcher left
        return child.returncode


def signal_session(session: int, number: int) -> None:
    """Send a signal to every process of a session, whatever group it moved to."""
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                os.kill(int(name), number)


def _closed(wait_s: float) -> bool:
    ready, _, _ = select.select([0], [], [], wait_s)
    return bool(ready) and os.read(0, 1) == b""


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the worker decides
    code = main(sys.argv[1], sys.argv[2:])
    sys.exit(code if code >= 0 else 128 - code)
