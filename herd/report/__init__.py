"""One run folder as a self-contained report.html and plots/*.png.

python -m herd.report runs/nano          |          herd.report.write("runs/nano")
"""

from pathlib import Path


def write(folder: str | Path) -> Path:
    """Read the run's files, write plots/*.png and report.html into its folder; returns the path of the latter.

    Works on partial runs (crashed, without teacher, without evaluations) and says in the report what is missing.
    Raises DataError when the folder holds none of a run's files.
    """
    from herd.report.page import write_page
    from herd.report.record import read_run

    return write_page(read_run(Path(folder)))
