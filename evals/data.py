"""Which text a model folder is to be scored on. No torch, so that a command can ask before its imports.

data = data_of(Path("runs/nano/students/scout"))           # what it was trained on, as its lineage says
"""

from pathlib import Path

from herd.run.schema import Data


def data_of(folder: Path, *, source: str | None = None, sequence_length: int | None = None) -> Data:
    """The data section of the run that made the model, unless a source (or one of its sources) is named instead."""
    settings = _trained_on(folder)
    if source in settings.sources:
        settings = settings.alone(source)
    elif source is not None and (settings.sources or source != settings.source):
        settings = Data(source=source, sequence_length=settings.sequence_length)
    if sequence_length is not None:
        settings = settings.model_copy(update={"sequence_length": sequence_length})
    return settings


def _trained_on(folder: Path) -> Data:
    """The data section of the run that made the model, or that made what it was exported from; else the defaults."""
    from herd.run.lineage import read_lineage

    lineage = read_lineage(folder)
    if lineage.get("data_config"):
        return Data.model_validate(lineage["data_config"])
    return _trained_on(Path(lineage["source"])) if lineage.get("source") else Data()
