"""The command `python -m evals --model DIR [--against DIR]`: evaluate a model folder, as a table or as JSON."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.data import data_of
from herd.run import cli
from herd.run.errors import ConfigError
from herd.run.files import disk_faults
from herd.run.schema import Data, Run, Tracking

if TYPE_CHECKING:
    from evals.result import Result
    from evals.rows import Rows

_DESCRIPTION = (
    "Evaluate a model folder on held-out text: loss, bits per byte, divergence from a reference, size, memory,\n"
    "speed. docs/evaluation.md says what every number means."
)
_EXAMPLES = (
    "python -m evals --model runs/nano/students/scout --against runs/nano/teacher",
    "python -m evals --model runs/nano/exports/scout-int4 --against runs/nano/students/scout --json",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, evaluate, track the evaluation in MLflow, print it; returns the exit code."""
    arguments = _parser().parse_args(argv)
    return cli.main_guard(lambda: _command(arguments))


def _command(arguments: argparse.Namespace) -> None:
    data = _check(arguments)
    # Libraries print to stdout as they please; ours carries the result only.
    with contextlib.redirect_stdout(sys.stderr):
        rows = _open(arguments, data)
        result = None if arguments.dry_run else _run(arguments, rows)
    if result is None:
        print(json.dumps(_plan(arguments, data, rows), indent=2))
        return
    if arguments.json:
        print(json.dumps(result.entry(), indent=2))
    else:
        from evals.result import table

        print(table([result]))


def _parser() -> cli.Parser:
    parser = cli.parser("evals", description=_DESCRIPTION, examples=_EXAMPLES, config=False)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="model folder, plain or quantised")
    add("--against", type=Path, metavar="DIR", help="reference for KL, top-1 agreement and loss difference")
    add("--data", metavar="SOURCE", help="stdlib, a file or folder, or a hub dataset (default: what it was trained on)")
    add("--sequence-length", type=int, metavar="T", help="tokens a row (default: as in training, else 256)")
    add("--rows", type=int, default=64, metavar="N", help="held-out rows at most (default: 64)")
    add("--micro-rows", type=int, default=4, metavar="N", help="rows of a forward; less needs less memory (default: 4)")
    add(
        "--decode-tokens", type=int, default=64, metavar="N", help="tokens decoded to time it; 0 for none (default: 64)"
    )
    add("--device", default="cpu", help="where to run, such as cuda (default: cpu)")
    add("--control", action="store_true", help="record it as the student of that name trained without a teacher")
    add("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    add("--out", type=Path, metavar="FILE", help="evals.json to add the result to (it is in runs/evaluations/ as well)")
    add("--dry-run", action="store_true", help="look at model and text, print what would be evaluated on what, stop")
    add("--experiment", default=Tracking().experiment, metavar="NAME", help="MLflow experiment (herd)")
    add("--no-tracking", action="store_true", help="do not track this command in MLflow")
    return parser


def _plan(arguments: argparse.Namespace, data: Data, rows: "Rows") -> dict[str, Any]:
    options = ("model", "against", "micro_rows", "decode_tokens", "device")
    chosen = {name: getattr(arguments, name) for name in options}
    return {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()} | {
        "rows": len(rows.input_ids_NT),
        "tokens": rows.input_ids_NT.numel(),
        "data": data.model_dump(mode="json"),
    }


def _check(arguments: argparse.Namespace) -> Data:
    """Everything that can be refused before the heavy imports; returns where the held-out text comes from."""
    for name, least in (("rows", 1), ("micro_rows", 1), ("decode_tokens", 0)):
        value = getattr(arguments, name)
        if value < least:
            raise ConfigError(f"--{name.replace('_', '-')} = {value}: must be at least {least}")
    if arguments.sequence_length is not None and arguments.sequence_length < 8:
        raise ConfigError(f"--sequence-length = {arguments.sequence_length}: must be at least 8")
    for option in ("model", "against"):
        folder = getattr(arguments, option)
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"--{option} {folder}: no such folder; give the folder of a saved model")
    if arguments.out is not None and not arguments.out.parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: {arguments.out.parent} is no folder; make it first")
    return data_of(arguments.model, source=arguments.data, sequence_length=arguments.sequence_length)


def _open(arguments: argparse.Namespace, data: Data) -> "Rows":
    """Everything that can be refused before a model is loaded; returns the rows it will be evaluated on."""
    from evals.heldout import rows_from
    from evals.loading import check_folder
    from evals.result import read_entries
    from herd.run.devices import check_device

    check_device(arguments.device, said=f"--device {arguments.device}")
    if arguments.out is not None:
        read_entries(arguments.out)  # a file that is something else is refused before the work, not after
    for folder in filter(None, (arguments.model, arguments.against)):
        check_folder(folder)
    return rows_from(data, arguments.model, rows=arguments.rows)


def _run(arguments: argparse.Namespace, rows: "Rows") -> "Result":
    from transformers.utils import logging

    from evals.evaluation import evaluate

    logging.disable_progress_bar()
    result = evaluate(
        arguments.model,
        rows=rows,
        against=arguments.against,
        micro_rows=arguments.micro_rows,
        decode_tokens=arguments.decode_tokens,
        device=arguments.device,
    )
    if arguments.control:
        result = replace(result, role="control")
    _record(arguments, result, rows)
    return result


def _record(arguments: argparse.Namespace, result: "Result", rows: "Rows") -> None:
    """One MLflow run with its own small folder: what was evaluated on what, the numbers, and evals.json."""
    from evals.result import add_entries
    from herd.run.lineage import read_lineage
    from herd.run.tracking import open_tracker

    name = f"evaluate-{result.name}"
    folder = Run.model_fields["folder"].default / "evaluations" / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    folder.mkdir(parents=True)
    add_entries(folder / "evals.json", [result.entry()])
    if arguments.out is not None:
        with disk_faults(arguments.out, mend="name an --out on another disk"):
            add_entries(arguments.out, [result.entry()])
    tags = {"herd.role": "evaluation"}
    if parent := read_lineage(arguments.model).get("run_id"):
        tags["mlflow.parentRunId"] = parent
    tracker = open_tracker(
        folder, experiment=arguments.experiment, run_name=name, tags=tags, enabled=not arguments.no_tracking
    )
    settings = {key: str(getattr(arguments, key)) for key in ("model", "against", "rows", "device")}
    tracker.params(settings | {"data": rows.source})
    tracker.dataset("heldout", rows.source, rows.fingerprint, "heldout")
    tracker.metrics(
        {f"eval/{key}": value for key, value in result.entry().items() if isinstance(value, float | int)}, 0
    )
    tracker.artifact(folder / "evals.json")
    tracker.finish()


if __name__ == "__main__":
    sys.exit(main())
