"""`python -m sweeps transfer`: its flags, its plan, and the check from the first point to the report.

main(["--config", "configs/sweeps/transfer/smoke.yaml", "--dry-run"]) returns the exit code
"""

from pathlib import Path

from herd.run import cli
from herd.run.errors import ConfigError, Interrupted
from sweeps.transfer import settings
from sweeps.transfer.settings import TransferCheck

DESCRIPTION = """Check that settings found on a small model hold on a larger one: sizes of activations, and the best
learning rate, over width, depth, batch and tokens. The same command again goes on with what is there."""
EXAMPLES = (
    "python -m sweeps transfer --config configs/sweeps/transfer/smoke.yaml",
    "python -m sweeps transfer --set seeds=5 --out runs/sweeps/transfer --dry-run",
)


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = cli.parser("sweeps transfer", description=DESCRIPTION, examples=EXAMPLES, config=False)
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="YAML of the check; without it the default one")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the check; repeatable")
    add("--out", type=Path, metavar="FOLDER", help="where points, plots and report go (runs/sweeps/NAME)")
    add("--dry-run", action="store_true", help="check the settings, print what it would train, stop")
    arguments = parser.parse_args(argv)

    def body() -> None:
        check = settings.load(arguments.config, arguments.set)
        if arguments.out is not None:
            out = arguments.out.absolute()
            check = check.model_copy(update={"folder": out.parent, "name": out.name})
        settings.check_models(check)
        if arguments.dry_run:
            print(describe(check))
            return
        run(check, command=cli.command_line("sweeps", ["transfer", *argv]))

    return cli.main_guard(body)
