"""The commands over teacher targets on disk: `python -m teachers cache | inspect | verify`.

    python -m teachers cache --model DIR --data SOURCE --out DIR      make one, or go on with it
    python -m teachers inspect DIR                                    what it is of, how large
    python -m teachers verify DIR                                     read every byte of it

`--help` and mistakes in the arguments are answered before torch is imported.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from herd.run import cli
from herd.run.errors import DataError
from teachers.commands import options

_USAGE = (
    "usage: python -m teachers {cache,inspect,verify} ...\n\n"
    "  cache     make teacher targets of a data source, or complete those there are\n"
    "  inspect   what a cache is of, how large it is, what its teacher measured\n"
    "  verify    read a cache whole and report every damaged byte\n\n"
    "python -m teachers COMMAND --help says more."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Launchers put --local_rank before everything.
    name = next((word for word in words if not word.startswith("--local")), "--help")
    if name in ("-h", "--help"):
        print(_USAGE)
        return 0
    words.remove(name)
    commands: dict[str, Callable[[list[str]], Callable[[], None]]] = {
        "cache": _cache,
        "inspect": _inspect,
        "verify": _verify,
    }
    if name not in commands:
        print(f"error: {name}: no such command; use one of {', '.join(commands)}", file=sys.stderr)
        return 2
    return cli.main_guard(commands[name](words))


def _cache(words: list[str]) -> Callable[[], None]:
    arguments = options.parser().parse_args(words)

    def body() -> None:
        checked = options.check(arguments)
        if arguments.dry_run:
            from teachers.commands import plan

            made = plan.plan(checked)
            print(json.dumps(made.to_json(), indent=1) if arguments.json else made.to_text())
            return
        from teachers.commands import offline

        offline.run(checked, command=cli.command_line("teachers", ["cache", *words]))

    return body


def _inspect(words: list[str]) -> Callable[[], None]:
    parser = _folder_parser("teachers inspect", "What a cache is of, how large it is, and what its teacher measured.")
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="rows to decode for the means (default: 64)")
    arguments = parser.parse_args(words)

    def body() -> None:
        from teachers.commands import inspection

        found = inspection.inspect(arguments.folder, rows=arguments.rows)
        print(json.dumps(found, indent=1) if arguments.json else inspection.to_text(found))

    return body


def _verify(words: list[str]) -> Callable[[], None]:
    parser = _folder_parser("teachers verify", "Read a cache whole and report every damaged byte; exit code 4 if any.")
    arguments = parser.parse_args(words)

    def body() -> None:
        from dataclasses import asdict

        from teachers.cache.verification import verify

        report = verify(arguments.folder)
        if arguments.json:
            print(json.dumps(asdict(report), indent=1))
        else:
            print(
                f"{report.rows:,} rows in {report.records:,} records of {report.shards} shards "
                f"({report.unsealed} not sealed), {report.torn_bytes:,} bytes of unfinished records, "
                f"{len(report.faults)} faults"
            )
        if report.faults:
            raise DataError("\n".join(report.faults))

    return body


def _folder_parser(prog: str, description: str) -> argparse.ArgumentParser:
    example = f"python -m {prog} caches/behemoth"
    parser = cli.parser(prog, description=description, examples=(example,), config=False)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a cache")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
