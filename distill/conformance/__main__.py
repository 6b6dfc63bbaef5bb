"""Try a distillation loss, ours or another project's, for the defects that are known in the wild.

    python -m distill.conformance --target my.module:loss [--declare labels=unshifted] [--json]

Exit code 5 when a check fails. `--help` and mistakes in the arguments are answered before torch is imported.
"""

import argparse
import contextlib
import difflib
import json
import sys
from collections.abc import Sequence
from typing import Any

from distill.conformance.declarations import ALLOWED, Declared
from herd.run import cli
from herd.run.errors import ConfigError, NumericalError

DESCRIPTION = (
    "Try a distillation loss for the defects that are known in the wild, and for the properties every such loss has.\n"
    "docs/conformance.md lists the checks, and says what a loss must look like."
)
EXAMPLES = (
    "python -m distill.conformance --target my.losses:kd_loss",
    "python -m distill.conformance --target my.losses:kd --target my.losses:fused_kd --declare divergence=reverse_kl",
    "python -m distill.conformance --target distill.conformance.ours:dense --json",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return cli.main_guard(lambda: _command(arguments))


def _parser() -> cli.Parser:
    parser = cli.parser("distill.conformance", description=DESCRIPTION, examples=EXAMPLES, config=False)
    add = parser.add_argument
    add(
        "--target", action="append", required=True, metavar="MODULE:LOSS",
        help="what to try; with several, also whether they agree",
    )  # fmt: skip
    add(
        "--declare", action="append", default=[], metavar="KEY=VALUE",
        help=f"what no signature says, for all targets: {', '.join(ALLOWED)}; may be repeated",
    )  # fmt: skip
    add("--only", action="append", default=[], metavar="CHECK", help="run this check; may be repeated")
    add("--skip", action="append", default=[], metavar="CHECK", help="a deviation that is meant; may be repeated")
    add("--device", default="cpu", help="where to run, such as cuda (default: cpu)")
    add("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    add("--dry-run", action="store_true", help="print how the targets were understood and what would be checked, stop")
    return parser


def _command(arguments: argparse.Namespace) -> None:
    declared = _declared(arguments.declare)
    # What a foreign module or loss prints is not our result.
    with contextlib.redirect_stdout(sys.stderr):
        from distill.conformance import suite
        from distill.conformance.target import load

        for flag in ("only", "skip"):
            for name in getattr(arguments, flag):
                _check_name(flag, name, suite.NAMES)
        targets = [load(spec, declared, device=arguments.device) for spec in arguments.target]
        plan = {"targets": [str(target) for target in targets], "checks": list(arguments.only or suite.NAMES)}
        report = None if arguments.dry_run else suite.run(targets, only=arguments.only, skip=arguments.skip)
    if report is None:
        print(json.dumps(plan, indent=1))
        return
    print(json.dumps(report.to_json(), indent=1) if arguments.json else report.to_text())
    if report.failed:
        raise NumericalError(f"failed: {', '.join(report.failed)}; a deviation that is meant can be left out by --skip")
    if not report.count("passed"):
        raise ConfigError(f"--target {arguments.target[0]}: no check applies; --dry-run shows how it was understood")


def _declared(words: Sequence[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"--declare {word}: must be KEY=VALUE, such as labels=unshifted")
        facts[key] = value
    Declared.of("the command line", facts)
    return facts


def _check_name(flag: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(names)}"
        raise ConfigError(f"--{flag} {name}: unknown check; {hint}")


if __name__ == "__main__":
    sys.exit(main())
