"""What a trial's run has reached: its metrics stream while it runs, its evaluation when it is done.

stream = MetricsStream(run_folder / "metrics.jsonl", head_start=160)
for step, value in stream.new("heldout/scout"): ...
final(run_folder, "evals/scout-int4/bytes_on_disk")
"""

import difflib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from herd.run.errors import ConfigError, first_line

LARGEST, LARGEST_STEP = 1e100, 2**31  # the latter is a database's


class MetricsStream:
    """Reads the whole lines that were added since the last call; a run that goes on may write a step again.

    Steps are the students' own: they count from where a teacher's head start ends, and nothing before it is read.
    """

    def __init__(self, path: Path, head_start: int = 0) -> None:
        self._path, self._head_start = path, head_start
        self._offset, self._last = 0, b""

    def new(self, metric: str) -> Iterator[tuple[int, float]]:
        """(step, value) of every new line that has the metric."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            # A resumed run cuts off what its checkpoint does not know, and may have written on since.
            file.seek(self._offset - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._offset, self._last = file.seek(0), b""
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset, self._last = self._offset + len(line), line
                if not line.strip():
                    continue
                record = _record(self._path, line)
                step = int(record["step"]) - self._head_start
                if _is_number(record.get(metric)) and step > 0:
                    yield step, _float(record[metric])


def final(folder: Path, metric: str) -> float:
    """The last value of a metric in a finished run. ConfigError naming what the run did report when it has none."""
    if metric.startswith("evals/"):
        known = _evaluated(folder)
    else:
        path = folder / "metrics.jsonl"
        if not path.exists():
            raise ConfigError(f"objectives: a run ended without {path}; its program must write {metric} there")
        lines = [line for line in path.read_bytes().splitlines() if line.strip()]
        known = {key: value for line in lines for key, value in _record(path, line).items()}
    value = known.get(metric)
    if _is_number(value):
        return _float(value)
    numbers = [key for key, value in known.items() if _is_number(value) and key != "step"]
    near = difflib.get_close_matches(metric, numbers, n=3, cutoff=0.3) or numbers[:3]
    mend = f"it has {', '.join(near)}" if near else "it reported no number at all"
    raise ConfigError(f"objectives: {folder} never reported {metric}; {mend}")


def usable(value: float) -> bool:
    """Whether a number can be compared and drawn; NaN, infinity and what is on its way there cannot."""
    return abs(value) < LARGEST


def _record(path: Path, line: bytes) -> dict[str, Any]:
    """A line of the stream. ConfigError when a program of the user's own wrote something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    step = record.get("step") if isinstance(record, dict) else None
    if not isinstance(step, int) or abs(step) >= LARGEST_STEP:
        text = line.decode(errors="replace").strip()[:80]
        raise ConfigError(
            f'{path}: a line is no JSON object with a whole "step": {text}; write {{"step": 1, "NAME": 0.5}}'
        )
    return record


def _float(value: int | float) -> float:
    """Whole numbers of any size included."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _evaluated(folder: Path) -> dict[str, Any]:
    path = folder / "evals.json"
    entries = json.loads(path.read_text())["entries"] if path.exists() else []
    return {f"evals/{entry['name']}/{key}": value for entry in entries for key, value in entry.items()}


def mlflow_run(folder: Path) -> str | None:
    """The MLflow id of a run folder's main run, where it has reached a store."""
    path = folder / "mlflow.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text()).get("runs", {}).get("main")  # none yet in a run cut off early
    except (ValueError, AttributeError, OSError) as error:
        raise ConfigError(
            f'{path}: is not {{"runs": {{"main": ID}}}} ({first_line(error)}); write that, or nothing'
        ) from None
