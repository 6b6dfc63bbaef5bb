"""What is read of a run folder: the last word on every step, and a note on everything that could not be read."""

import json
from pathlib import Path

import numpy as np

from herd.report.record import model_of, read_run, title
from tests.report.fabrication import fabricate_run


def test_a_resumed_run_counts_each_step_once_with_its_last_values(tmp_path: Path) -> None:
    lines = [{"step": s, "teacher/ce": 9.0 - s} for s in (1, 2, 3, 4)] + [
        {"step": s, "teacher/ce": 5.0} for s in (3, 4, 5)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    series = read_run(tmp_path).column("teacher/ce")
    assert series.step_S.tolist() == [1, 2, 3, 4, 5]
    assert series.value_S.tolist() == [8, 7, 5, 5, 5]


def test_half_a_line_of_a_killed_run_is_left_out_and_told(tmp_path: Path) -> None:
    folder = fabricate_run(tmp_path / "nano", steps=5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "teacher/ce": 4.')
    record = read_run(folder)
    assert record.last_step == 5
    assert record.problems == ["metrics.jsonl has 1 unreadable line, left out"]


def test_damaged_files_are_told_and_do_not_stop_the_report(tmp_path: Path) -> None:
    folder = fabricate_run(tmp_path / "nano", steps=5)
    (folder / "evals.json").write_text("{")
    (folder / "config.yaml").write_text("run: [")
    record = read_run(folder)
    assert not record.entries and not record.config and len(record.steps) == 5
    assert [problem.split()[0] for problem in record.problems] == ["evals.json", "config.yaml"]


def test_values_that_are_not_numbers_are_gaps(tmp_path: Path) -> None:
    lines = ['{"step": 1, "x": 1.5}', '{"step": 2, "x": NaN}', '{"step": 3, "x": null}', '{"step": 4}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    step_S, value_S = read_run(tmp_path).column("x")
    assert step_S.tolist() == [1, 2] and np.isnan(value_S[1])


def test_models_come_in_the_configurations_order_after_the_teacher(tmp_path: Path) -> None:
    record = read_run(fabricate_run(tmp_path / "nano", steps=5))
    assert record.models == ["teacher", "scout", "maverick"]


def test_an_export_goes_by_its_students_name() -> None:
    entry = {"name": "scout-int4", "role": "export", "student": "scout", "scheme": "int4"}
    assert (model_of(entry), title(entry)) == ("scout", "scout int4")
    assert model_of({"name": "behemoth-nano", "role": "teacher"}) == "teacher"
