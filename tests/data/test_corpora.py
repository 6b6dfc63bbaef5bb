"""What a corpus holds: every text once, in one part, under a stable fingerprint; and clear words for bad input."""

from pathlib import Path

import pytest

from herd.data.corpora import open_corpus
from herd.data.splits import PARTS
from herd.data.text_files import cut_passages
from herd.run.errors import DataError
from herd.run.schema import Data


def everything(corpus) -> dict[str, list[tuple[str, str]]]:
    return {part: [(document.id, document.text) for document in corpus.documents(part)] for part in PARTS}


def test_parts_are_disjoint_and_hold_every_distinct_text(folder: Path, data: Data):
    parts = everything(open_corpus(data))
    texts = [text for part in parts.values() for _, text in part]
    assert len(texts) == len(set(texts)) == 60
    assert set(texts) == {path.read_text(encoding="utf-8") for path in folder.rglob("*.txt")}
    assert all(parts.values())


def test_opening_twice_gives_the_same_documents_and_fingerprint(data: Data):
    first, second = open_corpus(data), open_corpus(data)
    assert first.fingerprint == second.fingerprint
    assert everything(first) == everything(second)


def test_the_fingerprint_changes_with_a_text_a_name_and_the_split(tmp_path: Path):
    def fingerprint(**fields) -> str:
        return open_corpus(Data(source=str(tmp_path), **fields)).fingerprint

    for number in range(5):
        (tmp_path / f"{number}.md").write_text(f"text {number}")
    seen = {fingerprint(), fingerprint(heldout_fraction=0.3)}
    (tmp_path / "0.md").write_text("text X")
    seen.add(fingerprint())
    (tmp_path / "0.md").rename(tmp_path / "00.md")
    seen.add(fingerprint())
    assert len(seen) == 4


def test_the_fingerprint_does_not_change_when_the_folder_moves(tmp_path: Path):
    here = tmp_path / "here"
    here.mkdir()
    for number in range(5):
        (here / f"{number}.txt").write_text(f"text {number}")
    before = open_corpus(Data(source=str(here))).fingerprint
    here.rename(tmp_path / "there")
    assert open_corpus(Data(source=str(tmp_path / "there"))).fingerprint == before


def test_repeated_and_empty_texts_are_left_out(tmp_path: Path):
    for name, text in {"a": "one", "b": "two", "c": "one", "d": " \n", "e": "three", "f": "two"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    corpus = open_corpus(Data(source=str(tmp_path)))
    found = [document for part in everything(corpus).values() for document in part]
    assert sorted(found) == [("a.txt", "one"), ("b.txt", "two"), ("e.txt", "three")]
    assert "3 empty or repeated left out" in corpus.describe()


def test_hidden_files_and_other_formats_are_not_text(tmp_path: Path):
    for name in ("a.txt", "b.py", "c.md", ".git/d.txt", "__pycache__/e.py", "f.bin", "sub/g.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"this is {name}")
    parts = everything(open_corpus(Data(source=str(tmp_path))))
    assert sorted(id for part in parts.values() for id, _ in part) == ["a.txt", "b.py", "c.md", "sub/g.txt"]


def test_one_long_file_is_cut_into_passages_that_join_to_it(folder: Path, tmp_path: Path):
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt")))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    parts = everything(open_corpus(Data(source=str(tmp_path / "book.txt"))))
    passages = {int(id.split("#")[1]): text for part in parts.values() for id, text in part}
    assert "".join(passages[number] for number in sorted(passages)) == text
    assert all(parts.values())


def test_passages_have_bounded_length_even_without_line_ends():
    text = "x" * 50_000
    passages = list(cut_passages(text))
    assert "".join(passages) == text
    assert max(map(len, passages)) <= 16_384


def test_a_sample_is_a_stable_subset_of_about_the_size_asked_for(corpus):
    everything_of_train = [document.id for document in corpus.documents("train")]
    total = sum(len(document.text.encode()) for document in corpus.documents("train"))
    sample = [document.id for document in corpus.sample("train", total // 2)]
    assert sample == [document.id for document in corpus.sample("train", total // 2)]
    assert set(sample) < set(everything_of_train)
    assert 0.25 < len(sample) / len(everything_of_train) < 0.75
    assert [document.id for document in corpus.sample("train", total)] == everything_of_train
    assert len(list(corpus.sample("train", 1))) == 1


def test_the_embedded_corpus_is_code_and_prose_of_useful_size():
    corpus = open_corpus(Data())
    parts = everything(corpus)
    ids = {id for part in parts.values() for id, _ in part}
    assert {"stdlib/argparse.py", "stdlib/json/decoder.py", "stdlib/topics/assert"} <= ids
    assert not any("site-packages" in id or "/test/" in id or "_sysconfigdata" in id for id in ids)
    assert sum(len(text) for part in parts.values() for _, text in part) > 5_000_000
    assert 0.01 < len(parts["heldout"]) / len(ids) < 0.12
    assert open_corpus(Data()).fingerprint == corpus.fingerprint


def bad_sources(root: Path) -> dict[str, tuple[Data, str]]:
    """Bad input and what its line must say."""
    (root / "empty.txt").write_text("")
    (root / "latin.txt").write_bytes(b"caf\xe9 " * 9)
    (root / "notes.jsonl").write_text('{"body": "a", "n": 1}\n' * 3)
    (root / "broken.jsonl").write_text('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n')
    (root / "number.jsonl").write_text('{"text": 1}\n{"text": 2}\n{"text": 3}\n')
    (root / "broken.parquet").write_bytes(b"PAR1 and no more")
    (root / "images").mkdir()
    (root / "images" / "a.png").write_bytes(b"x")
    (root / "nothing").mkdir()
    return {
        "missing": (Data(source=str(root / "note.jsonl")), r"no such file or folder \(nearest: '.*notes\.jsonl'"),
        "missing folder": (Data(source=str(root / "no" / "where.txt")), "nor a folder"),
        "empty": (Data(source=str(root / "empty.txt")), "is empty"),
        "not utf-8": (Data(source=str(root / "latin.txt")), r"not UTF-8 text \(byte 0xe9 at 3\).*iconv"),
        "wrong field": (
            Data(source=str(root / "notes.jsonl")),
            r"data\.text_field = 'text': .* there are: body \(string\), n",
        ),
        "wrong field, streamed": (Data(source=str(root / "notes.jsonl"), streaming=True), "there are: body"),
        "broken json": (Data(source=str(root / "broken.jsonl")), r"broken\.jsonl cannot be read: JSON parse error"),
        "not text": (Data(source=str(root / "number.jsonl")), "row 0 of number.jsonl holds a int, not text"),
        "broken parquet": (Data(source=str(root / "broken.parquet")), r"broken\.parquet cannot be read: .*[Pp]arquet"),
        "no known format": (Data(source=str(root / "images")), r"there is \.png\); allowed: \.txt, \.md"),
        "nothing": (Data(source=str(root / "nothing")), "there is nothing"),
        "file, not here": (
            Data(source="texts/mine.jsonl"),
            r"^data\.source = texts/mine\.jsonl: no such file or folder",
        ),
        "hub": (Data(source="nobody/nothing"), "nobody/nothing.*no such file or folder"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "missing",
        "missing folder",
        "empty",
        "not utf-8",
        "wrong field",
        "wrong field, streamed",
        "broken json",
        "not text",
        "broken parquet",
        "no known format",
        "nothing",
        "file, not here",
        "hub",
    ],
)
def test_bad_sources_are_told_in_one_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture):
    data, pattern = bad_sources(tmp_path)[name]
    with pytest.raises(DataError, match=pattern) as caught:
        open_corpus(data, cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
