"""Folders a user names: made, or found to be such as can be made, with one line where they are not.

check_folder(out, "--out")          # early, in a dry run too: touches nothing
make_folder(out, "--out")           # when there is something to put there
"""

import os
from pathlib import Path

from herd.run.errors import ConfigError, EnvironmentFault


def make_folder(folder: Path, field: str) -> None:
    """Make a folder and those above it. Raises ConfigError where a file is in the way, else EnvironmentFault."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise _file_in_the_way(error.filename, field) from error
    except OSError as error:
        raise EnvironmentFault(f"{field}: {folder} cannot be made ({error.strerror}); set another {field}") from error


def check_folder(folder: Path, field: str) -> None:
    """Raise what `make_folder` most likely would, without making anything."""
    folder = folder.absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise _file_in_the_way(nearest, field)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise EnvironmentFault(f"{field}: {nearest} cannot be written to; set another {field}")


def _file_in_the_way(path: str | Path, field: str) -> ConfigError:
    return ConfigError(f"{field}: {path} is a file, not a folder; set another {field}")
