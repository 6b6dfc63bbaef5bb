"""Rows of jsonl, json and parquet files and of hub datasets, through `datasets`, stored or streamed.

file_table("json", paths, data, storage=cache / "datasets")
hub_table(data)           any dataset id of the hub; HF_HUB_OFFLINE is respected, code of a dataset is never run
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.data.sources import CountingReader, Cursor, Document, Source
from herd.run import hub
from herd.run.errors import DataError, HerdError
from herd.run.files import disk_faults
from herd.run.schema import Data

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset

TABLE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
ROWS_READ_AT_ONCE = 1000


class StoredTable:
    """A source over a dataset that lies on disk as Arrow."""

    def __init__(self, name: str, identity: str, dataset: "Dataset", field: str) -> None:
        self.name = name
        self.identity = identity
        self._dataset = dataset.select_columns([field]).with_format("arrow")
        self._field = field

    def read(self, cursor: Cursor | None = None) -> CountingReader:
        return CountingReader(self._documents(), cursor)

    def _documents(self) -> Iterator[Document]:
        row = 0
        for table in self._dataset.iter(ROWS_READ_AT_ONCE):
            for value in table[self._field].to_pylist():
                yield _document(self.name, row, self._field, value)
                row += 1


class StreamedTable:
    """A source over a dataset that is read as it comes; its cursor holds the shard and the place in it.

    `open_dataset` makes a new object for every reader: two readers of one `IterableDataset` share a position.
    """

    def __init__(self, name: str, identity: str, open_dataset: "Callable[[], IterableDataset]", field: str) -> None:
        self.name = name
        self.identity = identity
        self._open_dataset = open_dataset
        self._field = field

    def read(self, cursor: Cursor | None = None) -> "StreamedReader":
        return StreamedReader(self.name, self._open_dataset().select_columns([self._field]), self._field, cursor)


class StreamedReader:
    """Reads a streamed table from a cursor on."""

    def __init__(self, name: str, dataset: "IterableDataset", field: str, cursor: Cursor | None) -> None:
        self._name, self._dataset, self._field = name, dataset, field
        self._start = cursor if cursor is not None else {"row": 0, "dataset": None}
        self._row = self._start["row"]
        if self._start["dataset"] is not None:
            dataset.load_state_dict(self._start["dataset"])
        self._rows = iter(dataset)

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        with one_line(self._name):
            row = next(self._rows)
        self._row += 1
        return _document(self._name, self._row - 1, self._field, row[self._field])

    def cursor(self) -> Cursor:
        # A dataset that has not begun has no state yet.
        begun = self._row > self._start["row"]
        return {"row": self._row, "dataset": self._dataset.state_dict()} if begun else self._start


def file_table(loader: str, paths: list[Path], data: Data, *, root: Path, storage: Path) -> Source:
    """The rows of local files of one format ("json", "parquet") in the order of their paths; empty files are left out.

    Arrow copies go to `storage`. Raises DataError for a broken file or a missing text field.
    """
    import datasets

    ordered = sorted(path for path in paths if path.stat().st_size > 0)
    listing = "\n".join(f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in ordered)
    name = root.name if root.is_file() else f"{root.name}:{loader}"
    with (
        one_line(f"{root}:{loader}" if root.is_dir() else str(root), hint="; mend or remove it"),
        _quiet(),
        disk_faults(storage),
    ):
        files = [str(path) for path in ordered]
        builder = datasets.load_dataset_builder(loader, data_files=files, cache_dir=str(storage))
        return _table(builder, name, f"{loader}\n{listing}\n{data.text_field}", "train", data)


def hub_table(data: Data, *, hint: str) -> Source:
    """A dataset of the hub by its id (with `data.subset` and `data.split`); `hint` is added when it cannot be read.

    Raises DataError when it is not there, has no such subset or split, or no such text field; EnvironmentFault when the
    hub does not answer.
    """
    import datasets

    name = f"{data.source}:{data.split}" if data.subset is None else f"{data.source}/{data.subset}:{data.split}"
    with one_line(name, hint=hint), hub.asked(f"data.source = {data.source}", source=data.source, hint=hint):
        builder = datasets.load_dataset_builder(data.source, data.subset)
        # The hash names the subset and the commit (or the files' etags) it was resolved to.
        return _table(builder, name, f"hub\n{name}\n{builder.hash}\n{data.text_field}", data.split, data)


def _table(builder: "DatasetBuilder", name: str, identity: str, split: str, data: Data) -> Source:
    field = data.text_field
    if data.streaming:
        try:
            dataset = builder.as_streaming_dataset(split)
        except ValueError as fault:
            raise DataError(f"data.split = {split!r}: {name}: {fault}; name one of them") from fault
        features = dataset.features if dataset.features is not None else next(iter(dataset), {})
        _check_field(name, field, {key: getattr(kind, "dtype", "") for key, kind in features.items()})
        return StreamedTable(name, identity, lambda: builder.as_streaming_dataset(split), field)
    builder.download_and_prepare()
    splits = list(builder.info.splits)
    if split.split("[")[0] not in splits:
        raise DataError(f"data.split = {split!r}: {name} has the splits {', '.join(splits)}; name one of them")
    dataset = builder.as_dataset(split)
    _check_field(name, field, {key: getattr(kind, "dtype", "") for key, kind in dataset.features.items()})
    return StoredTable(name, identity, dataset, field)


def _check_field(name: str, field: str, kinds: dict[str, Any]) -> None:
    if field not in kinds:
        there = ", ".join(f"{key} ({kind})" if kind else key for key, kind in kinds.items()) or "no fields at all"
        raise DataError(f"data.text_field = {field!r}: {name} has no such field; there are: {there}")


def _document(name: str, row: int, field: str, value: object) -> Document:
    if value is None:
        return Document(f"{name}:{row}", "")  # an empty row; corpora leave those out
    if not isinstance(value, str):
        raise DataError(
            f"data.text_field = {field!r}: row {row} of {name} holds a {type(value).__name__}, not text; "
            "name a field of strings"
        )
    return Document(f"{name}:{row}", value)


@contextmanager
def one_line(name: str, *, hint: str = "") -> Iterator[None]:
    """Turn what `datasets` and its file readers raise for bad data into one DataError line with the first cause."""
    try:
        yield
    except (HerdError, StopIteration):
        raise
    except Exception as fault:  # whatever pyarrow, fsspec and the hub's HTTP client of the day raise
        cause: BaseException = fault
        while cause.__cause__ is not None:
            cause = cause.__cause__
        line = " ".join(str(cause).split())[:300]
        raise DataError(f"data.source: {name} cannot be read: {line}{hint}") from fault


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep bars and error logs of `datasets` off the screen: local files load fast, and faults are told in one line."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
