"""The error tree: every failure a user can cause is one line and one exit code.

Raise the class that fits; `herd.run.cli.main` prints the line on stderr and exits with its code.
A message names the field, the value, what is allowed and the mend.
"""

from pathlib import Path

DONE = 0
USAGE = 2
ENVIRONMENT = 3
DATA = 4
NUMERICAL = 5
INTERRUPTED = 75  # EX_TEMPFAIL: schedulers may requeue


class HerdError(Exception):
    """Base of every error that is the user's to mend."""

    exit_code = 1


class ConfigError(HerdError):
    """A field, flag or combination of them that cannot be run."""

    exit_code = USAGE


class EnvironmentFault(HerdError):
    """The machine lacks something: a compiler, a port, disk, a reachable server."""

    exit_code = ENVIRONMENT


class DiskFull(EnvironmentFault):
    """A disk, a quota or a file-size limit used up at `place`, a file or folder; None where it is not known."""

    def __init__(self, message: str, place: Path | None = None) -> None:
        super().__init__(message)
        self.place = place


class DataError(HerdError):
    """Data, a model folder or a checkpoint that cannot be read or does not fit."""

    exit_code = DATA


class NumericalError(HerdError):
    """NaN, Inf or divergence."""

    exit_code = NUMERICAL


class Diverged(NumericalError):
    """Of a model that trains: an earlier checkpoint, or a lower rate, helps."""


class Interrupted(HerdError):
    """Stopped on request after saving; the message is the command that resumes."""

    exit_code = INTERRUPTED


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its name when it has none: other libraries' errors as part of a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
