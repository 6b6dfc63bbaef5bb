"""`python -m sweeps transfer`: its flags, its plan, and the check from the first point to the report.

main(["--config", "configs/sweeps/transfer/smoke.yaml", "--dry-run"]) returns the exit code
"""

from collections.abc import Iterator
from pathlib import Path

from herd.llama4.specs import find_spec
from herd.run import cli
from herd.run.folders import check_folder
from sweeps.transfer import settings
from sweeps.transfer.settings import Grid, Scale, TransferCheck, shape

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
        check_folder(check.home, "--out")
        if arguments.dry_run:
            for line in describe(check):
                print(line, flush=True)
            return
        from sweeps.transfer.check import run

        outcome = run(check, command=cli.command_line("sweeps", ["transfer", *argv]))
        print(f"\n{outcome.table()}\n\nreport: {check.home / 'report.html'}")

    return cli.main_guard(body)


def describe(check: TransferCheck) -> Iterator[str]:
    """The check in words, line by line: sizes, points at least, and the products they cost (a while to count)."""
    yield f"check     {check.name}, {check.source}, {check.seeds} seeds\nfolder    {check.home}"
    probe = check.coordinates
    for along, grid in probe.grids.items():
        sizes = ", ".join(f"{size.width} x {size.depth}" for size in grid.sizes(along))
        work = f"{probe.steps} steps of {probe.rows} rows, {probe.seeds} seeds"
        yield f"sizes     of activations over {along}: {sizes}; {work}; {_arms(grid)}"
    for along, grid in check.grids.items():
        shown = ", ".join(
            f"{size.width} x {size.depth}, {size.steps} steps of {size.rows} rows" for size in grid.sizes(along)
        )
        yield f"{along:9} {shown}; {_arms(grid)}"
    points, flops = cost(check)
    yield f"points    {points} at least, {flops:.3g} FLOPs; what is finished is not trained again"


def cost(check: TransferCheck) -> tuple[int, float]:
    """Points of the grids at least, and the products of training those and the coordinate checks."""
    from herd.llama4.counts import training_flops

    spec = find_spec(check.source)

    def a_token(size: Scale) -> float:
        config = spec.config(vocab_size=check.vocab_size, pad_token_id=None, **shape(check, size))
        return training_flops(config, check.sequence_length)

    probe, points, flops = check.coordinates, 0, 0.0
    for along, grid in probe.grids.items():
        runs = (2 if grid.standard else 1) * probe.seeds
        flops += sum(
            runs * probe.rows * probe.steps * check.sequence_length * a_token(size) for size in grid.sizes(along)
        )
    for along, grid in check.grids.items():
        for size in grid.sizes(along):
            trained = (2 if grid.standard and size != grid.base else 1) * (2 * check.bracket + 1) * check.seeds
            points += trained
            flops += trained * size.rows * size.steps * check.sequence_length * a_token(size)
    return points, flops


def _arms(grid: Grid) -> str:
    return "our rules and standard" if grid.standard else "our rules"
