"""The command `python -m herd.report RUN`: write report.html and plots/*.png into a run's folder."""

import sys
from collections.abc import Sequence
from pathlib import Path

import herd.report
from herd.run import cli

_DESCRIPTION = (
    "Write a self-contained report.html and plots/*.png from the files of a run folder. Partial runs (crashed,\n"
    "still running, not evaluated) are fine: the report says what is missing."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, write the report, print where it is; returns the exit code."""
    examples = ("python -m herd.report runs/nano",)
    parser = cli.parser("herd.report", description=_DESCRIPTION, examples=examples, config=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/nano")
    arguments = parser.parse_args(argv)
    return cli.main_guard(lambda: print(herd.report.write(arguments.run)))


if __name__ == "__main__":
    sys.exit(main())
