"""A run's metrics stream as a study reads it, while it is written and cut back."""

import json

import pytest

from herd.run.errors import ConfigError
from sweeps.metrics import MetricsStream, final


def lines(*steps, loss=0.0):
    return "".join(json.dumps({"step": step, "loss": step + loss}) + "\n" for step in steps)


def test_new_lines_are_read_once_and_half_a_line_when_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    stream = MetricsStream(path)
    assert list(stream.new("loss")) == []
    path.write_text(lines(1, 2) + '{"step": 3, "lo')
    assert list(stream.new("loss")) == [(1, 1.0), (2, 2.0)]
    path.write_text(lines(1, 2, 3))
    assert list(stream.new("loss")) == [(3, 3.0)]


@pytest.mark.parametrize("after", [(1, 2), (1, 2, 3), (1, 2, 3, 4, 5, 6, 100, 101)])
def test_a_stream_that_was_cut_back_and_written_on_is_read_again_from_its_start(tmp_path, after):
    path = tmp_path / "metrics.jsonl"
    stream = MetricsStream(path)
    path.write_text(lines(1, 2, 3, 4))
    assert len(list(stream.new("loss"))) == 4
    path.write_text(lines(*after, loss=0.25))
    assert [step for step, _ in stream.new("loss")] == list(after)


def test_the_students_steps_count_from_where_the_head_start_ends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2, 3, 4))
    assert [step for step, _ in MetricsStream(path, head_start=2).new("loss")] == [1, 2]


@pytest.mark.parametrize("line", ["loss 0.5", "[1]", '{"loss": 0.5}', '{"step": 1.5, "loss": 0.5}'])
def test_a_line_of_another_kind_is_shown_with_the_right_one(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{lines(1)}{line}\n")
    for read in (lambda: list(MetricsStream(path).new("loss")), lambda: final(tmp_path, "loss")):
        with pytest.raises(ConfigError, match=r'no JSON object with a whole "step".*write {"step": 1'):
            read()
