"""The command `python -m herd.report RUN`: write report.html and plots/*.png into a run's folder."""

import argparse
import sys
from pathlib import Path

import herd.report
from herd.run.cli import main_guard


def main() -> int:
    """Parse the command line, write the report, print where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m herd.report",
        description="Write a self-contained report.html and plots/*.png from the files of a run folder. Partial runs "
        "(crashed, still running, not evaluated) are fine: the report says what is missing.",
        epilog="example: python -m herd.report runs/nano",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/nano")
    print(herd.report.write(parser.parse_args().run))
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
