"""The whole check, from the first point to the report, as one MLflow run.

outcome = run(settings.load(None), command="python -m sweeps transfer")
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from herd.run.errors import Interrupted
from herd.run.files import write_atomic
from herd.run.tracking import open_tracker
from sweeps.stopping import Stop, stop_signals
from sweeps.transfer import coordinates, grids, report
from sweeps.transfer.bench import Bench
from sweeps.transfer.coordinates import Coordinate
from sweeps.transfer.grids import Shelf
from sweeps.transfer.report import Outcome
from sweeps.transfer.settings import TransferCheck


def run(check: TransferCheck, *, command: str) -> Outcome:
    """Train what is missing, read everything, write the report. Raises Interrupted; what is finished is kept."""
    tracking = check.tracking
    tracker = open_tracker(
        check.home,
        experiment=tracking.experiment,
        run_name=check.name,
        uri=tracking.uri,
        config=check.model_dump(mode="json"),
        tags={"herd.role": "transfer", **tracking.tags},
        enabled=tracking.enabled,
    )
    try:
        with stop_signals() as stop:
            bench = Bench.open(check)
            seen = measure_coordinates(bench, check.home, stop)
            curves = grids.run_grids(bench, Shelf(check.home / "points"), stop, lambda line: print(line, flush=True))
        outcome = report.summarise(check, curves, seen)
        page = report.write(check, outcome, curves)
    except Interrupted:
        tracker.finish("KILLED")
        raise Interrupted(f"{check.name} is stopped; finished points are kept, it goes on with: {command}") from None
    except BaseException:
        tracker.finish("FAILED")
        raise
    for finding in outcome.findings:
        if finding.ruled:
            values = {"moved": finding.moved, "excess": finding.excess, "slope": finding.slope.value}
            tracker.metrics({f"transfer/{finding.along}/{name}": value for name, value in values.items()}, 0)
    for path in (page, check.home / report.RESULT, *sorted((check.home / "plots").glob("*.png"))):
        tracker.artifact(path, folder="report")
    tracker.finish()
    return outcome


def measure_coordinates(bench: Bench, home: Path, stop: Stop) -> list[Coordinate]:
    """The coordinate checks, read when they have been made with these settings."""
    identity = bench.coordinate_identity()
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    path = home / "points" / f"coordinates-{key}.json"
    if path.exists():
        return [Coordinate(**row) for row in json.loads(path.read_text())["rows"]]
    rows = coordinates.check(bench, stop)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"settings": identity, "rows": [asdict(row) for row in rows]}) + "\n")
    return rows
