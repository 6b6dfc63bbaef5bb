"""Runs a command and sees to it that nothing of it outlives the one who asked.

    python sweeps/guard.py LOCK command ...          (started by sweeps.trial, which holds its stdin open)

When stdin closes, because the worker stopped the trial or died, every process of the command gets SIGTERM, and SIGKILL
30 s later. Holds LOCK meanwhile, and names the command's session in it: whoever goes on with the same run waits until
this one is gone, and ends what a guard that was killed left behind. Standard library only.
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
    with open(lock, "a+") as file:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if _closed(GLANCE_S):
                return 75
        file.seek(0)
        end_left(file.read())
        # A session of its own holds the launcher and every rank it starts.
        child = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
        file.truncate(0)
        file.write(mark_of(child.pid))
        file.flush()
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


def mark_of(session: int) -> str:
    """What tells a session from any other, of another start of the machine too."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot} {session} {''.join(fields_of(session)[19:20])}"


def end_left(mark: str) -> None:
    """End the session that a mark names, if any of it lives: SIGTERM, and SIGKILL 30 s later."""
    words = mark.split()
    if len(words) != 3:
        return
    session, leader = int(words[1]), mark_of(int(words[1]))
    if leader not in (mark, f"{words[0]} {session} "):  # another machine's start, or another process of that number
        return
    stopping, number = time.monotonic(), signal.SIGTERM
    while signal_session(session, number):
        time.sleep(GLANCE_S)
        number = signal.SIGKILL if time.monotonic() - stopping > GRACE_S else 0


def signal_session(session: int, number: int) -> int:
    """Send a signal to every process of a session, whatever group it moved to; how many there are."""
    of_all = {int(name): fields_of(int(name)) for name in os.listdir("/proc") if name.isdecimal()}
    found = [pid for pid, fields in of_all.items() if fields and int(fields[3]) == session and fields[0] != "Z"]
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return len(found)


def fields_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none of a process that is no more."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()
    return []


def _closed(wait_s: float) -> bool:
    ready, _, _ = select.select([0], [], [], wait_s)
    return bool(ready) and os.read(0, 1) == b""


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the worker decides
    code = main(sys.argv[1], sys.argv[2:])
    sys.exit(code if code >= 0 else 128 - code)
