"""jsonl, json, parquet and datasets of several splits, stored and streamed, give the same texts."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetGenerationError

from herd.data.corpora import open_corpus
from herd.data.sources import Reader
from herd.data.splits import PARTS
from herd.data.tables import hub_table
from herd.run.errors import DataError, DiskFull
from herd.run.schema import Data

SHARES = {"heldout_fraction": 0.3, "calibration_fraction": 0.3}
TEXTS = [f"text number {number}, naïve 中文 🦙" for number in range(40)]


def write(folder: Path, kind: str, texts: list[str], name: str = "rows") -> Path:
    """A file of one format with these texts in the field `body`."""
    path = folder / f"{name}.{kind}"
    rows = [{"id": number, "body": text} for number, text in enumerate(texts)]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def open_parts(source: Path, cache: Path, *, streaming: bool) -> dict[str, list[str]]:
    data = Data(source=str(source), text_field="body", streaming=streaming, **SHARES)
    corpus = open_corpus(data, cache=cache)
    return {part: [document.text for document in corpus.documents(part)] for part in PARTS}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_every_format_gives_every_text_once_in_order(kind: str, streaming: bool, tmp_path: Path):
    parts = open_parts(write(tmp_path, kind, TEXTS), tmp_path / "cache", streaming=streaming)
    assert sorted(text for part in parts.values() for text in part) == sorted(TEXTS)
    assert all(part == [text for text in TEXTS if text in part] for part in parts.values())
    assert len(parts["heldout"]) > 3


def test_streaming_splits_as_storing_does(tmp_path: Path):
    path = write(tmp_path, "jsonl", TEXTS * 5)
    stored, streamed = (open_parts(path, tmp_path / "cache", streaming=streaming) for streaming in (False, True))
    assert {part: set(texts) for part, texts in streamed.items()} == {p: set(texts) for p, texts in stored.items()}


def test_a_folder_may_mix_formats_and_ids_name_the_row(tmp_path: Path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write(folder, "jsonl", TEXTS[:10], "a")
    write(folder, "jsonl", TEXTS[10:20], "b")
    write(folder, "parquet", TEXTS[20:30])
    for number, text in enumerate(TEXTS[30:]):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    corpus = open_corpus(Data(source=str(folder), text_field="body"), cache=tmp_path / "cache")
    found = {document.id: document.text for part in PARTS for document in corpus.documents(part)}
    assert len(found) == 40
    assert found["3.txt"] == TEXTS[33]
    assert found["mixed:json:12"] == TEXTS[12]
    assert found["mixed:parquet:9"] == TEXTS[29]


def test_rows_without_text_are_left_out(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["a", None, "", "b", "c"]))
    corpus = open_corpus(Data(source=str(path)), cache=tmp_path / "cache")
    found = {document.id: document.text for part in PARTS for document in corpus.documents(part)}
    assert found == {"rows.jsonl:0": "a", "rows.jsonl:3": "b", "rows.jsonl:4": "c"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", [0, 1, 13, 26, 39])
def test_a_cursor_goes_on_with_the_next_document(streaming: bool, place: int, tmp_path: Path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        write(folder, "parquet", TEXTS[20 * number : 20 * number + 20], f"{number}")
    (folder / "0.txt").write_text("a text file before the tables")
    data = Data(source=str(folder), text_field="body", streaming=streaming)
    corpus = open_corpus(data, cache=tmp_path / "cache")
    source = corpus._source
    reader: Reader = source.read()
    before = [next(reader) for _ in range(place)]
    cursor = json.loads(json.dumps(reader.cursor()))
    list(source.read())  # another reader must not move this one
    after = list(reader)
    assert list(source.read(cursor)) == after
    assert before + after == list(source.read())


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A dataset as the hub keeps it: a folder of parquet files by split."""
    root = tmp_path / "repository"
    (root / "data").mkdir(parents=True)
    write(root / "data", "parquet", TEXTS[:30], "train-00000-of-00001")
    write(root / "data", "parquet", TEXTS[30:], "test-00000-of-00001")
    return root


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_with_splits_gives_the_one_asked_for(streaming: bool, repository: Path, monkeypatch, tmp_path: Path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = Data(source=str(repository), split="test", text_field="body", streaming=streaming)
    assert [document.text for document in hub_table(data, hint="").read()] == TEXTS[30:]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_split_names_those_there_are(streaming: bool, repository: Path, monkeypatch, tmp_path: Path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = Data(source=str(repository), split="dev", text_field="body", streaming=streaming)
    with pytest.raises(DataError, match=r"data\.split = 'dev'.*train.*test"):
        hub_table(data, hint="")


def test_a_copy_that_finds_no_room_is_a_full_disk_and_not_bad_data(tmp_path: Path, monkeypatch):
    path = write(tmp_path, "jsonl", TEXTS)

    def no_room(*_: object, **__: object) -> None:
        raise DatasetGenerationError("An error occurred") from OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.DatasetBuilder.download_and_prepare", no_room)
    with pytest.raises(DiskFull, match=rf"^cannot write {tmp_path}/cache/datasets: the disk is full \("):
        open_corpus(Data(source=str(path), text_field="body"), cache=tmp_path / "cache")
