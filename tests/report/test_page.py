"""The page: every number in its tables is in evals.json, nothing comes from outside, partial runs are told as such."""

import base64
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest

import herd.report
from herd.report import formats
from herd.run.errors import DataError
from tests.report.fabrication import entries, fabricate_run

FORMS = {
    "heldout_nats": formats.nats,
    "bits_per_byte": formats.nats,
    "kl_mean": formats.small,
    "kl_p99": formats.small,
    "top1_agreement": formats.percent,
    "parameters": formats.amount,
    "bytes_on_disk": formats.size,
    "bits_per_weight": formats.plain,
    "peak_memory_bytes": formats.size,
    "decode_tokens_per_s": formats.rate,
}


class Reader(HTMLParser):
    """Collects table cells (row title, key, value, text), addresses the page refers to, and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[dict[str, str]] = []
        self.addresses: list[str] = []
        self.text = ""
        self.row = ""
        self._into: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        facts = dict(attributes)
        self.addresses += [
            facts[name] for name in ("src", "srcset", "href", "action", "data", "poster") if name in facts
        ]
        if tag == "th" and facts.get("scope") == "row":
            self.row, self._into = "", "row"
        elif tag == "td":
            self.cells.append({"row": self.row, "key": facts["data-key"], "value": facts["data-value"], "text": ""})
            self._into = "cell"
        elif tag == "small":
            self._into = None

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._into = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._into == "row":
            self.row += data
        elif self._into == "cell":
            self.cells[-1]["text"] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return herd.report.write(fabricate_run(tmp_path_factory.mktemp("runs") / "nano", steps=60))


def titled(entry: dict) -> str:
    alone = " alone" if entry["role"] == "control" else ""
    return f"{entry['name']}{alone}" if entry["scheme"] is None else f"{entry['name']} {entry['scheme']}"


def without(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def rewrite(folder: Path, keep) -> None:
    """Keep only the metrics whose key `keep` accepts."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k in ("step", "tokens", "elapsed_s") or keep(k)} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def test_every_number_in_the_tables_is_that_of_evals_json(page: Path) -> None:
    cells = Reader(page.read_text()).cells
    by_title = {titled(entry): entry for entry in entries()}
    assert {cell["row"] for cell in cells} == by_title.keys()
    for cell in cells:
        value = by_title[cell["row"]].get(cell["key"])
        assert cell["value"] == ("" if value is None else str(value))
        assert cell["text"] == FORMS[cell["key"]](value)
    shown = {(cell["row"], cell["key"]) for cell in cells}
    assert shown >= {(titled(e), key) for e in entries() if e["role"] != "control" for key in FORMS}


def test_intervals_in_the_tables_are_those_of_evals_json(page: Path) -> None:
    html = page.read_text()
    for entry in entries():
        if entry["role"] != "control":
            for key in ("heldout_ci95", "bits_per_byte_ci95"):
                assert f"<small>{formats.interval(entry[key])}</small>" in html


def test_the_page_refers_to_nothing_outside_itself(page: Path) -> None:
    html = page.read_text()
    addresses = Reader(html).addresses
    assert len(addresses) == 10
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not re.search(r"url\(|@import|<script|<link|<iframe", html)


def test_every_picture_is_whole_in_both_widths_and_a_file_beside_the_page(page: Path) -> None:
    images = [base64.b64decode(address.partition(",")[2]) for address in Reader(page.read_text()).addresses]
    widths = [struct.unpack(">I", image[16:20])[0] for image in images]
    assert set(widths) == {1680, 840}
    files = sorted((page.parent / "plots").glob("*.png"))
    assert [file.stem for file in files] == ["alpha", "experts", "losses", "quality", "throughput"]
    assert {file.read_bytes() for file in files} <= set(images)


def test_the_commands_and_the_configuration_are_there_to_copy(page: Path) -> None:
    text = Reader(page.read_text()).text
    assert "deepspeed --num_accelerators 2 --module distill --config configs/nano.yaml" in text
    assert (page.parent / "config.yaml").read_text() in text


def test_the_end_of_training_and_of_the_run_are_both_shown(page: Path) -> None:
    html = page.read_text()
    for name in ("started", "trained", "finished"):
        moment = json.loads((page.parent / "run.json").read_text())[name]
        assert f"<dt>{name}</dt><dd>{moment}</dd>" in html


def test_names_from_a_run_are_text_and_not_markup(tmp_path: Path) -> None:
    folder = fabricate_run(tmp_path / "nano", steps=2)
    without(folder, "metrics.jsonl")
    (folder / "run.json").write_text(json.dumps({"commands": ["echo '<script>alert(1)</script>'"]}))
    html = herd.report.write(folder).read_text()
    assert "<script" not in html and "&lt;script&gt;" in html


PARTS = ("config.yaml", "metrics.jsonl", "evals.json", "mlflow.json", "run.json")


@pytest.mark.parametrize("only", PARTS)
def test_a_run_of_which_one_file_is_left_still_gets_a_report(tmp_path: Path, only: str) -> None:
    folder = fabricate_run(tmp_path / "nano", steps=12)
    without(folder, *(name for name in PARTS if name != only))
    text = Reader(herd.report.write(folder).read_text()).text
    assert "Not known from this run folder" in text or only == "evals.json"


def test_a_run_of_one_step_gets_a_report(tmp_path: Path) -> None:
    folder = fabricate_run(tmp_path / "nano", steps=1)
    assert "losses" in herd.report.write(folder).read_text()


def test_a_run_without_teacher_shows_its_students_only(tmp_path: Path) -> None:
    folder = fabricate_run(tmp_path / "alone", steps=12)
    config = (folder / "config.yaml").read_text().replace("mode: codistill", "mode: none")
    (folder / "config.yaml").write_text(config)
    students = [entry for entry in entries() if entry["role"] != "teacher"]
    (folder / "evals.json").write_text(json.dumps({"entries": students}))
    rewrite(folder, lambda key: "teacher" not in key and "alpha" not in key and "gap" not in key)
    text = Reader(herd.report.write(folder).read_text()).text
    assert "without a teacher" in text
    assert "the teacher reaches" not in text and "from the teacher" not in text
    assert not (folder / "plots" / "alpha.png").exists()


def test_a_run_of_one_student_gets_a_report(tmp_path: Path) -> None:
    folder = fabricate_run(tmp_path / "one", steps=12)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"  maverick:.*?(?=loss:)", "", config, flags=re.DOTALL))
    (folder / "evals.json").write_text(json.dumps({"entries": [e for e in entries() if e["name"] != "maverick"]}))
    rewrite(folder, lambda key: "maverick" not in key)
    assert "maverick" not in Reader(herd.report.write(folder).read_text()).text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds none of config\.yaml"):
        herd.report.write(tmp_path)
