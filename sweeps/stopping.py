"""Asking a study to stop: SIGINT and SIGTERM set a flag that everything looks at between two glances.

with stop_signals() as stop: ...; stop.asked
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """Whether somebody asked for an end, by SIGINT or SIGTERM."""

    asked = False

    def ask(self, *_: object) -> None:
        """The signals' handler."""
        self.asked = True


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM set the flag that is given; the old handlers return afterwards."""
    stop = Stop()
    try:
        old = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread of a user's script: signals are theirs
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
