"""Where an export goes, and where it is made until it is whole. No torch, so that a command can ask before its imports.

check_target(Path("exports/scout-int4"))           # not there yet
unfinished(path)                                   # exports/.scout-int4.incomplete
"""

from pathlib import Path

from herd.run.errors import ConfigError


def check_target(path: Path) -> None:
    """Raise ConfigError when something is already there: an export is never overwritten."""
    if path.exists():
        raise ConfigError(f"out = {path}: exists; remove it or choose another folder")


def unfinished(path: Path) -> Path:
    """The folder beside it in which an export is made."""
    return path.with_name(f".{path.name}.incomplete")


def finished_layers(path: Path) -> Path:
    """Where a calibrated method keeps the layers it has finished, for a command that is started again."""
    return unfinished(path) / "layers"
