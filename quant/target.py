"""Where an export goes: a folder that is not there yet. No torch, so that a command can ask before its imports."""

from pathlib import Path

from herd.run.errors import ConfigError


def check_target(path: Path) -> None:
    """Raise ConfigError when something is already there: an export is never overwritten."""
    if path.exists():
        raise ConfigError(f"out = {path}: exists; remove it or choose another folder")
