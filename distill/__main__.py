"""The trainer's command line: `deepspeed --num_accelerators 2 --module distill --config configs/nano.yaml`.

Also `python -m distill ...` (one rank, no launcher) and `deepspeed distill/train.py ...` (the same program).
Configuration errors and --help come before any heavy import.
"""

import sys

from distill.export_checks import check_exports
from herd.run import cli, launcher
from herd.run.config import load, split_batch

DESCRIPTION = "Co-distil students from a teacher, compress them, evaluate everything and write a report."
EXAMPLES = (
    "deepspeed --num_accelerators 2 --module distill --config configs/nano.yaml --set optim.lr=1e-3",
    "python -m distill --config configs/scout.yaml --dry-run --world-size 512",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = cli.parser("distill", description=DESCRIPTION, examples=EXAMPLES, resume=True, dry_run=True)
    arguments = parser.parse_args(argv)

    def body() -> None:
        config = load(arguments.config, arguments.set)
        check_exports(config)
        if arguments.dry_run:
            from distill import plan

            plan.show(config, world_size=arguments.world_size, mfu=arguments.mfu)
            return
        split_batch(config, launcher.world_size())  # before the seconds that the imports take
        from herd.run import extensions, lean_deepspeed

        extensions.choose_accelerator()
        lean_deepspeed.load()
        from distill import session

        session.run(config, resume=arguments.resume, command=cli.command_line("distill", argv))

    return cli.main_guard(body, interrupted="interrupted; nothing was saved since the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
