"""Quantise a model folder and export it; or run an export.

    python -m quant --model runs/nano/students/scout --scheme int4 --out exports/scout-int4 [--dry-run] [--json]
    python -m quant generate --model exports/scout-int4 --prompt TEXT          (quant/runtime/command.py)

`--help` and mistakes in the arguments are answered before torch is imported.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.run import cli
from herd.run.errors import ConfigError, Interrupted
from herd.run.files import disk_faults
from herd.run.schema import Quantize
from quant.descriptions import describe, describe_work, foretell, summary
from quant.memory import spare_memory
from quant.options import CALIBRATED, add_method_options, calibration_of, check_method_options, read_choices
from quant.readers import COMPRESSED, CONTAINERS, READERS, SCHEMES, check_reader, check_scheme
from quant.runtime import command
from quant.target import can_go_on, check_target

if TYPE_CHECKING:
    from quant.calibration.settings import Calibration
    from quant.plans import Plan

GROUP_SIZE = Quantize.model_fields["group_size"].default


def main(argv: list[str] | None = None) -> int:
    """Parse, then plan (`--dry-run`) or export and track, or `generate`; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["generate"]:
        asked = command.parse(words[1:])
        return cli.main_guard(lambda: command.run(asked))
    options = parse(words)

    def body() -> None:
        with disk_faults(options.out, mend="name an --out on another disk"), kept_layers(options.out):
            run(options)

    return cli.main_guard(body)


@contextmanager
def kept_layers(out: Path) -> Iterator[None]:
    """Ctrl-C inside says what is not lost."""
    try:
        yield
    except KeyboardInterrupt:
        if can_go_on(out):
            raise Interrupted("stopped; finished layers are kept, and the same command goes on from them") from None
        raise


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(
        "quant",
        description="Quantise a model folder (text-only Llama 4, or a dense causal LM) and export it. A fresh process\n"
        "reloads the export and refuses it unless it computes what the quantised model in memory computes.\n\n"
        "schemes:\n" + "\n".join(f"  {name:14s}{kind.summary}" for name, kind in SCHEMES.items()),
        examples=(
            "python -m quant --model runs/nano/students/scout --scheme int4 --out exports/scout-int4",
            "python -m quant --model DIR --scheme fp8 --out DIR2 --ignore '*.layers.0.*' --dry-run",
            "python -m quant --model DIR --allocation bits.json --out DIR3    (from python -m sweeps bits)",
            "python -m quant generate --model exports/scout-int4 --prompt TEXT    (runs an export; see its --help)",
        ),
        config=False,
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="unquantised model folder (safetensors)")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--scheme", choices=tuple(SCHEMES), metavar="NAME", help="number format, one of the above")
    which.add_argument(
        "--allocation", type=Path, metavar="FILE",
        help='several formats: JSON of groups of layers, such as {"*": "fp8", "*.experts": "int4-g64", "G": "bf16"}',
    )  # fmt: skip
    add("--container", choices=CONTAINERS, help="what its tensors go into; each scheme has a usual one")
    add("--reader", choices=READERS, help="refuse a scheme that this program cannot read")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to make; must not exist")
    add("--group-size", type=group_size, metavar="N", help="weights that share a scale: 32, 64 (default), 128, channel")
    add(
        "--ignore", action="append", default=[], metavar="PATTERN",
        help="keep layers in bf16: a glob over layer names, or re:EXPRESSION; may be repeated",
    )  # fmt: skip
    add_method_options(parser)
    add("--dry-run", action="store_true", help="print what would be quantised, kept and written, stop")
    add("--json", action="store_true", help="print the result as JSON")
    add("--experiment", default="herd", metavar="NAME", help="MLflow experiment (herd)")
    add("--no-tracking", action="store_true", help="do not track this command in MLflow")
    return parser.parse_args(argv)


def group_size(text: str) -> int | str:
    """A number, or `channel`."""
    return int(text) if text.isdecimal() else text


def check(options: argparse.Namespace) -> None:
    """Everything that can be refused before the heavy imports; fills in the group size of int4."""
    if not options.model.is_dir():
        raise ConfigError(f"--model {options.model}: no such folder; give the folder of a saved model")
    check_target(options.out)
    if options.out.resolve().is_relative_to(options.model.resolve()):
        raise ConfigError(f"--out {options.out}: lies in the --model folder; choose a place outside it")
    options.choices = None
    if options.allocation is not None:
        check_allocation(options)
        return
    if not SCHEMES[options.scheme].grouped and options.group_size is not None:
        raise ConfigError(f"--group-size {options.group_size}: {options.scheme} has no choice of groups; leave it out")
    check_method_options(options)
    options.container = options.container or SCHEMES[options.scheme].containers[0]
    if options.group_size is None:
        options.group_size = GROUP_SIZE
    check_scheme(options.scheme, options.group_size, options.container)
    if options.reader is not None:
        check_reader(options.scheme, options.container, options.reader, moe=False)


def check_allocation(options: argparse.Namespace) -> None:
    """The same for an allocation, whose labels say group sizes and which goes into one container."""
    for flag, value in (("--group-size", options.group_size), ("--container", options.container)):
        if value is not None:
            raise ConfigError(f"{flag} {value}: an allocation says it itself; leave it out")
    options.choices = read_choices(options.allocation)
    options.container = COMPRESSED
    check_method_options(options)


def run(options: argparse.Namespace) -> None:
    """Do what the options ask; errors a user can mend are raised."""
    check(options)
    spare_memory()
    import transformers

    from herd.run.lineage import read_lineage
    from quant.exports import export
    from quant.gate_process import GateProcess
    from quant.quantized import quantize

    transformers.logging.set_verbosity_error()
    started = time.monotonic()
    # Rows are drawn for a plan too: whether there is enough text is part of it.
    calibration = calibration_of(options, options.out)
    quantized = quantize(
        options.model,
        scheme=options.scheme,
        allocation=options.choices,
        group_size=options.group_size or GROUP_SIZE,
        container=options.container,
        ignore=tuple(options.ignore),
        method=options.method,
        calibration=calibration,
    )
    if options.reader is not None:
        for scheme in quantized.plan.allocation.schemes:
            check_reader(scheme.name, options.container, options.reader, moe=quantized.plan.has_experts)
    result = summary(quantized.plan) | foretell(options, quantized.plan, calibration)
    if options.dry_run:
        print(json.dumps(result, indent=1) if options.json else f"{describe(quantized.plan)}\n{describe_work(result)}")
        return
    with GateProcess() as gate:
        lineage = export_lineage(options, read_lineage(options.model))
        report = export(quantized, options.out, lineage=lineage, gate=gate)
    result |= {"out": str(options.out), "seconds": time.monotonic() - started, "gate": report.to_json()}
    track(options, quantized.plan, result, calibration)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"{describe(quantized.plan)}\n\n{report.to_text()}\n\nwritten: {options.out}")


def export_lineage(options: argparse.Namespace, source: dict[str, Any]) -> dict[str, Any]:
    """Lineage of the export: the source's teacher, data and tokenizer, with the source as its student."""
    inherited = ("teacher", "data_config", "data_fingerprint", "tokenizer_digest", "run_folder", "licence")
    facts = {key: source[key] for key in inherited if source.get(key) is not None}
    words = ["--model", str(options.model), *_scheme_words(options), "--out", str(options.out)]
    words += ["--method", options.method] if options.method != "rtn" else []
    for name in CALIBRATED:
        if getattr(options, name) is not None:
            words += ["--" + name.replace("_", "-"), str(getattr(options, name))]
    words += [word for pattern in options.ignore for word in ("--ignore", pattern)]
    command = shlex.join(["python", "-m", "quant", *words])
    student = source.get("name") or options.model.resolve().name
    return facts | {"student": student, "base_model": student, "source": str(options.model), "command": command}


def _scheme_words(options: argparse.Namespace) -> list[str]:
    if options.allocation is not None:
        return ["--allocation", str(options.allocation)]
    kind = SCHEMES[options.scheme]
    words = ["--scheme", options.scheme]
    words += ["--group-size", str(options.group_size)] if kind.grouped else []
    return words + (["--container", options.container] if options.container != kind.containers[0] else [])


def track(options: argparse.Namespace, plan: "Plan", result: dict[str, Any], calibration: "Calibration | None") -> None:
    """One MLflow run with the settings, the sizes, the gate's report and the model."""
    from herd.run.lineage import read_lineage
    from herd.run.tracking import open_tracker

    name = options.out.resolve().name
    settings = {
        "model": str(options.model),
        "scheme": options.scheme or plan.allocation.label,
        "container": options.container,
        "method": options.method,
        "ignore": list(options.ignore),
    }
    if options.allocation is not None:
        settings["allocation"] = options.choices
    elif SCHEMES[options.scheme].grouped:
        settings["group_size"] = options.group_size
    student = read_lineage(options.model).get("run_id")
    tracker = open_tracker(
        options.out,
        experiment=options.experiment,
        run_name=name,
        config=settings,
        tags={"herd.role": "export"} | ({"mlflow.parentRunId": student} if student else {}),
        enabled=not options.no_tracking,
    )
    sizes = ("bytes_before", "bytes_after", "bits_per_quantised_weight", "bits_per_weight", "seconds")
    metrics = {f"export/{key}": float(result[key]) for key in sizes}
    tracker.metrics(metrics, 0)
    tracker.artifact(options.out / "gate.json")
    tracker.artifact(options.out / "README.md")
    if calibration is not None:
        tracker.dataset("calibration rows", calibration.rows.source, calibration.rows.fingerprint, "calibration")
    if (options.out / "calibration.json").is_file():
        tracker.artifact(options.out / "calibration.json")
        seen = json.loads((options.out / "calibration.json").read_text())["summary"]
        tracker.metrics({f"calibration/{key}": float(value) for key, value in seen.items()}, 0)
    tracker.model(name, options.out, role="export", alias=plan.allocation.name, metrics=metrics, made_from=student)
    tracker.finish()


if __name__ == "__main__":
    sys.exit(main())
