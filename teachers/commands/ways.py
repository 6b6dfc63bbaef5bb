"""Ways to give students targets, and what each has to do: the one formula of `--dry-run` and of the break-even plot.

work(students=3, epochs=2)["offline"].forwards        # 1 of every row
"""

from dataclasses import dataclass

TOGETHER, EACH, WRITE_THROUGH, OFFLINE = "online together", "online each", "write-through", "offline"
MEANING = {
    TOGETHER: "all students in one run, the teacher's forward beside them",
    EACH: "a run for each student, the teacher's forward in all of them",
    WRITE_THROUGH: "the teacher trains anyway: its forward is there, the cache is a by-product",
    OFFLINE: "one forward of every row, read by every student and epoch",
}


@dataclass(frozen=True)
class Work:
    """How many times each row is worked on, only so that students have targets."""

    forwards: int
    """Of the teacher."""
    encodes: int
    """Into the cache."""
    uses: int
    """Of whole distributions, by a student's loss."""
    reads: int
    """Of the cache, by a student, its loss included."""


def work(*, students: int, epochs: int) -> dict[str, Work]:
    """What each way takes for students that each read all rows `epochs` times."""
    lessons = students * epochs
    return {
        TOGETHER: Work(forwards=epochs, encodes=0, uses=lessons, reads=0),
        EACH: Work(forwards=lessons, encodes=0, uses=lessons, reads=0),
        WRITE_THROUGH: Work(forwards=0, encodes=1, uses=0, reads=lessons),
        OFFLINE: Work(forwards=1, encodes=1, uses=0, reads=lessons),
    }
