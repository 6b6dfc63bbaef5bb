"""Which text a model folder is to be scored on. No torch, so that a command can ask before its imports.

data = data_of(Path("runs/nano/students/scout"))           # what it was trained on, as its lineage says
"""

from pathlib import Path

from herd.run.errors import ConfigError
from herd.run.schema import Data


def data_of(folder: Path, *, source: str | None = None, sequence_length: int | None = None) -> Data:
    """The data section of the run that made the model, unless a source (or one of its sources) is named instead.

    ConfigError when no source is named and lineage leads to a folder that is not there.
    """
    settings = _trained_on(folder, needed=source is None)
    if source in settings.sources:
        settings = settings.alone(source)
    elif source is not None and (settings.sources or source != settings.source):
        settings = Data(source=source, sequence_length=settings.sequence_length)
    if sequence_length is not None:
        settings = settings.model_copy(update={"sequence_length": sequence_length})
    return settings


def _trained_on(folder: Path, *, needed: bool) -> Data:
    """The data section of the run that made the model, or that made what it was exported from; else the defaults."""
    from herd.run.lineage import read_lineage

    place, seen = folder, {folder.resolve()}
    while not (lineage := read_lineage(place)).get("data_config"):
        if not lineage.get("source"):
            return Data()
        place = Path(lineage["source"])
        if not place.is_dir() or place.resolve() in seen:
            if not needed:
                return Data()
            fault = "names itself as its source" if place.is_dir() else f"was made from {place}, which is not there"
            raise ConfigError(f"{folder} {fault}, so that its data is not known; name some with --data")
        seen.add(place.resolve())
    return Data.model_validate(lineage["data_config"])
