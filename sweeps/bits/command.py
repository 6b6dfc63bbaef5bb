"""The command `python -m sweeps bits`: its flags, and what it measures, writes and prints; torch only to run it.

main(["--model", "runs/nano/students/scout", "--out", "runs/bits"])          # returns the exit code
"""

import argparse
from pathlib import Path

from evals.data import data_of
from herd.run import cli
from herd.run.errors import ConfigError
from herd.run.files import disk_faults

CHOICES = ("int4-g128", "int4-g64", "int4-g32", "int8", "fp8", "bf16")
LEAST = {"trials": 1, "rows": 1, "check_rows": 2, "micro_rows": 1, "seed": 0, "sequence_length": 8}


def main(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse(words)
    return cli.main_guard(lambda: run(options))


def parse(words: list[str]) -> argparse.Namespace:
    """The flags; mistakes leave with exit code 2."""
    parser = cli.parser(
        "sweeps bits",
        description="How many bits for each group of layers that servers merge (q/k/v, gate/up, an expert bank)?\n"
        "Measures the KL to the bf16 model by forward passes: each group alone with each choice, then whole\n"
        "allocations. Writes allocations for `python -m quant --allocation`, a table and a plot. The same\n"
        "command goes on where it was stopped.",
        examples=(
            "python -m sweeps bits --model runs/nano/students/scout --out runs/bits/scout --bits 4.5",
            "python -m sweeps bits --model DIR --out DIR2 --active-bits 6 --choices int4-g64 fp8 bf16 --dry-run",
            "python -m quant --model runs/nano/students/scout --allocation runs/bits/scout/search.json --out exports/s",
        ),
        config=False,
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="unquantised model folder (safetensors)")
    add(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for measurements and results; made, or gone on with",
    )
    add("--choices", nargs="+", metavar="LABEL", help=f"(those that fit of {' '.join(CHOICES)})")
    add(
        "--bits", metavar="X",
        help="bits per weight of the groups at most, scales included (4.5 without --active-bits); or one of the "
        "choices: as many as it takes everywhere",
    )  # fmt: skip
    add("--active-bits", metavar="X", help="the same over what a token reads: one expert of each bank")
    add(
        "--around", metavar="LABEL",
        help="choice of the others while a group is measured alone (the dearest that is within the budgets everywhere)",
    )  # fmt: skip
    add("--trials", type=int, default=64, metavar="N", help="whole allocations that are measured (64)")
    add("--sampler", default="nsga2", choices=("nsga2", "tpe", "random"), help="Optuna's (nsga2)")
    add("--rows", type=int, default=16, metavar="N", help="rows of the calibration part to search on (16)")
    add("--check-rows", type=int, default=64, metavar="N", help="held-out rows to compare the results on (64)")
    add("--data", metavar="SOURCE", help="stdlib, a file or folder, or a hub dataset (default: what it was trained on)")
    add("--sequence-length", type=int, metavar="T", help="tokens a row (default: as in training, else 256)")
    add("--micro-rows", type=int, default=4, metavar="N", help="rows of a forward; less needs less memory (4)")
    add("--seed", type=int, default=0, metavar="N", help="of the sampler (0)")
    add("--dry-run", action="store_true", help="print groups, sizes and the number of forward passes, stop")
    add("--experiment", default="herd", metavar="NAME", help="MLflow experiment (herd)")
    add("--no-tracking", action="store_true", help="do not track this command in MLflow")
    return parser.parse_args(words)


def check(options: argparse.Namespace) -> None:
    """What can be refused before the heavy imports."""
    if not options.model.is_dir():
        raise ConfigError(f"--model {options.model}: no such folder; give the folder of a saved model")
    for name, least in LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be {least} or more")
    options.leave_out = options.choices is None
    options.choices = options.choices or list(CHOICES)
    if options.bits is None and options.active_bits is None:
        options.bits = "4.5"
    options.data = data_of(options.model, source=options.data, sequence_length=options.sequence_length)


def run(options: argparse.Namespace) -> None:
    """Measure, solve, search, compare; errors a user can mend are raised."""
    check(options)
    import transformers

    from sweeps.bits import allocating

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.dry_run:
        print(allocating.describe(options))
        return
    with disk_faults(options.out, mend="name an --out on another disk"):
        print(allocating.run(options))
