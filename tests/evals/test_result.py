"""evals.json keeps one entry a model folder; the table says every number with its unit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from evals.intervals import Interval
from evals.result import Result, add_entries, summary, table
from herd.run.errors import DataError

RESULT = Result(
    name="scout-int4",
    role="export",
    student="scout",
    scheme="int4",
    path="runs/nano/exports/scout-int4",
    data="stdlib",
    rows=64,
    tokens=16384,
    documents=41,
    heldout_nats=4.61921,
    heldout_ci95=Interval(4.53, 4.70),
    bits_per_byte=1.9912,
    bits_per_byte_ci95=None,
    reference="scout",
    reference_nats=4.607,
    loss_difference=0.01221,
    loss_difference_ci95=Interval(0.0101, 0.0144),
    kl_mean=0.01234,
    kl_mean_ci95=Interval(0.0119, 0.0128),
    kl_p99=0.0901,
    top1_agreement=0.9712,
    top1_agreement_ci95=Interval(0.968, 0.974),
    parameters=4_810_000,
    bytes_on_disk=4_020_000,
    folder_bytes=4_420_000,
    bits_per_weight=6.69,
    quantised_bits_per_weight=4.25,
    peak_memory_bytes=None,
    decode_tokens_per_s=91.5,
)


def test_a_second_evaluation_of_a_folder_replaces_the_first_in_its_place(tmp_path: Path) -> None:
    file = tmp_path / "evals.json"
    add_entries(file, [{"path": "a", "x": 1}, {"path": "b", "x": 2}])
    add_entries(file, [{"path": "a", "x": 3}, {"path": "c", "x": 4}])
    assert json.loads(file.read_text())["entries"] == [
        {"path": "a", "x": 3},
        {"path": "b", "x": 2},
        {"path": "c", "x": 4},
    ]


def test_entries_survive_json(tmp_path: Path) -> None:
    add_entries(tmp_path / "evals.json", [RESULT.entry()])
    (entry,) = json.loads((tmp_path / "evals.json").read_text())["entries"]
    assert entry["heldout_nats"] == RESULT.heldout_nats and entry["heldout_ci95"] == [4.53, 4.70]
    assert entry["peak_memory_bytes"] is None and entry["student"] == "scout"


def test_a_damaged_evals_file_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "evals.json"
    file.write_text('{"entries": [')
    with pytest.raises(DataError, match=r"evals\.json"):
        add_entries(file, [RESULT.entry()])
    assert file.read_text() == '{"entries": ['


def test_the_table_shows_what_was_measured_and_leaves_out_what_was_not() -> None:
    text = table([RESULT])
    for shown in (
        "scout-int4 (int4) against scout",
        "4.6192",
        "[4.5300, 4.7000]",
        "+0.0122",
        "0.01234",
        "91.5",
        "4.25",
    ):
        assert shown in text
    assert "peak memory" not in text


def test_the_summary_gives_every_model_one_line_under_its_headings() -> None:
    teacher = replace(RESULT, name="teacher", reference=None, decode_tokens_per_s=None, heldout_ci95=None)
    header, first, second = summary([teacher, RESULT]).splitlines()
    assert first.split() == ["teacher", "4.6192", "4.02", "MB", "6.69"]
    assert second.startswith("scout-int4")
    for heading, shown in (
        ("held-out", "4.6192 [4.530, 4.700]"),
        ("KL", "0.01234 (scout)"),
        ("weights", "4.02 MB"),
        ("decoding", "92 tokens/s"),
    ):
        assert second.startswith(shown, header.index(heading))
