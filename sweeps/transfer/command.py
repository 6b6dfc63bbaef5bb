"""`python -m sweeps transfer`: its flags, its plan, and the check from the first point to the report.

main(["--config", "configs/sweeps/transfer/smoke.yaml", "--dry-run"]) returns the exit code
"""

from pathlib import Path

from herd.llama4.specs import find_spec
from herd.run import cli
from sweeps.transfer import settings
from sweeps.transfer.settings import TransferCheck, shape

DESCRIPTION = """Check that settings found on a small model hold on a larger one: sizes of activations, and the best
learning rate, over width, depth, batch and tokens. The same command again goes on with what is there."""
EXAMPLES = (
    "python -m sweeps transfer --config configs/sweeps/transfer/smoke.yaml",
    "python -m sweeps transfer --set grids={}                    (coordinate checks alone)",
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
        from sweeps.transfer.check import run

        outcome = run(check, command=cli.command_line("sweeps", ["transfer", *argv]))
        print(f"\n{outcome.table()}\n\nreport: {check.home / 'report.html'}")

    return cli.main_guard(body)


def describe(check: TransferCheck) -> str:
    """The check in words: sizes, points at least, and the products they cost."""
    from herd.llama4.counts import training_flops

    lines = [f"check     {check.name}, {check.source}, {check.seeds} seeds", f"folder    {check.home}"]
    spec, points, flops = find_spec(check.source), 0, 0.0
    for along, grid in check.grids.items():
        sizes = grid.sizes(along)
        arms = "our rules and standard" if grid.standard else "our rules"
        shown = ", ".join(f"{size.width} x {size.depth}, {size.steps} steps of {size.rows} rows" for size in sizes)
        lines.append(f"{along:9} {shown}; {arms}")
        for size in sizes:
            config = spec.config(vocab_size=check.vocab_size, pad_token_id=None, **shape(check, size))
            trained = (2 if grid.standard and size != grid.base else 1) * (2 * check.bracket + 1) * check.seeds
            points += trained
            tokens = size.rows * size.steps * check.sequence_length
            flops += trained * tokens * training_flops(config, check.sequence_length)
    lines.append(f"points    {points} at least, {flops:.3g} FLOPs; what is finished is not trained again")
    return "\n".join(lines)
