"""The progress line: readable, on rank 0 only, and without a carriage return outside a terminal."""

import io

import pytest

from herd.run.progress import Progress, clock_face, describe


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_reads_as_promised() -> None:
    values = {"teacher": 4.911, "scout": 5.024, "scout alpha": 0.12, "maverick": 5.1}
    line = describe(120, 400, values, steps_per_s=280 / 221, tokens_per_step=1823.6)
    assert line == "step 120/400  teacher 4.91  scout 5.02 (alpha 0.12)  maverick 5.10  2,310 tok/s  ETA 3:41"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (221, "3:41"), (3725, "1:02:05"), (183_600, "2d 3:00:00"), (172_800, "2d 0:00:00")],
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert clock_face(seconds) == text


def test_plain_lines_come_every_few_seconds_and_always_at_the_ends() -> None:
    stream, now = io.StringIO(), iter(range(0, 1000, 2))
    with Progress(total=12, interval_s=7, stream=stream, clock=lambda: next(now)) as progress:
        for step in range(1, 13):
            progress.update(step, step * 100, {"scout": 5.0})
    text = stream.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    assert [line.split()[1] for line in text.splitlines()] == ["1/12", "5/12", "9/12", "12/12"]
    assert text.splitlines()[-1] == "step 12/12  scout 5.00  50 tok/s  ETA 0:00"


def test_speed_and_eta_are_right_from_the_first_step_after_a_resume() -> None:
    stream, now = io.StringIO(), iter([0.0, 4.0])
    with Progress(total=400, start=120, stream=stream, clock=lambda: next(now)) as progress:
        progress.update(121, 121 * 2048, {})
    assert stream.getvalue() == f"step 121/400  512 tok/s  ETA {clock_face(279 * 4)}\n"


def test_a_terminal_gets_a_bar_that_starts_where_the_run_does() -> None:
    stream = Terminal()
    with Progress(total=10, start=5, stream=stream) as progress:
        progress.update(6, 600, {"scout": 5.0})
        progress.say("a line of its own")
    assert "\r" in stream.getvalue()
    assert "a line of its own\n" in stream.getvalue()


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for stream in (io.StringIO(), Terminal()):
        with Progress(total=2, stream=stream, interval_s=0) as progress:
            progress.update(1, 10, {"scout": 5.0})
            progress.say("hello")
        assert stream.getvalue() == ""
