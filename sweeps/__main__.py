"""Run a study: `python -m sweeps --study configs/sweeps/rates.yaml --trials 20 --workers 2`.

The same command again goes on with it, and so does the same command on another machine when the storage is shared.
`python -m sweeps bits --model DIR --out DIR2` allocates bits to layers, by forward passes (sweeps/bits/).
"""

import sys
from pathlib import Path

from herd.run import cli, config_text
from herd.run.errors import ConfigError, NumericalError
from herd.run.store import shown
from sweeps import ranges, scale, settings
from sweeps.bits.command import main as allocate_bits
from sweeps.transfer.command import main as check_transfer

DESCRIPTION = """Search over a configuration: every trial is a real training run in its own process and folder.
The same command again goes on with a study; on another machine, with a shared storage, it joins in."""
EXAMPLES = (
    "python -m sweeps --study configs/sweeps/rates.yaml --workers 2",
    "python -m sweeps --study configs/sweeps/weighting.yaml --trials 40 --set sampler.kind=gp --dry-run",
    "python -m sweeps bits --model DIR --out DIR2 --bits 4.5    (bits for each group of layers; see its --help)",
    "python -m sweeps transfer --dry-run       (do settings of a small model hold on a large one?)",
    "python -m sweeps scale --from configs/sweeps/rates.yaml --to configs/maverick.yaml     (carry them there)",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    commands = {"bits": allocate_bits, "transfer": check_transfer, "scale": scale.main}
    if words and words[0] in commands:
        return commands[words[0]](words[1:])
    if words and not words[0].startswith("-"):
        return cli.main_guard(lambda: _unknown(words[0], list(commands)))
    parser = cli.parser("sweeps", description=DESCRIPTION, examples=EXAMPLES, config=False)
    add = parser.add_argument
    add("--study", required=True, type=Path, metavar="FILE", help="YAML of the study")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the study; repeatable")
    add("--trials", type=int, metavar="N", help="budget.trials")
    add("--workers", type=int, metavar="N", help="launch.workers: trials at one time on this machine")
    add("--dry-run", action="store_true", help="check the study and its space, print what it would run, stop")
    arguments = parser.parse_args(argv)

    def body() -> None:
        for flag, value in (("--trials", arguments.trials), ("--workers", arguments.workers)):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} {value}: must be 1 or more")
        given = {"budget.trials": arguments.trials, "launch.workers": arguments.workers}
        flags = [f"{key}={value}" for key, value in given.items() if value is not None]
        study = settings.load(arguments.study, [*arguments.set, *flags])
        if arguments.dry_run:
            print(describe(study))
            return
        from sweeps import pool

        result = pool.run(study, command=cli.command_line("sweeps", argv))
        print(f"\n{result.table()}\n\nreport: {study.home / 'report.html'}")
        if result.best is None and result.trials:
            why = next((f" ({trial.why}, for one)" for trial in result.trials if trial.why), "")
            raise NumericalError(
                f"{study.name}: no trial is complete, so there is no best one{why}; mend the base, or search elsewhere"
            )

    return cli.main_guard(body)


def _unknown(word: str, commands: list[str]) -> None:
    raise ConfigError(f"{word}: no such command; use {', '.join(commands)}, or --study FILE")


def describe(study: settings.Study) -> str:
    """The study in words, after it has been checked against the configuration, this machine and what has run."""
    from sweeps import checks, spaces, storages
    from sweeps.ledger import Ledger

    base = checks.check(study)
    found = storages.find_study(study, base) if study.storage_file else None
    first = spaces.defaults(base, study.space) if study.enqueue_defaults else None
    lines = [f"study     {study.name}, {study.base}, {len(study.set)} overrides", f"folder    {study.home}"]
    lines += [
        f"storage   {shown(study.storage_url)}{'' if study.storage_file else ' (not asked in a dry run)'}",
        "space",
    ]
    lines += [f"  {path}: {_values(part)}" for path, part in study.space.items()]
    lines += [f"objective {part.direction} {part.metric}" for part in study.objectives]
    if found is not None:
        ended = len(Ledger(found, study.trials).ended())
        lines.append(f"goes on   {ended} of {study.trials} trials have ended")
    else:
        outside = ", ".join(spaces.outside(base, study.space))
        why = f"the base lies outside the space in {outside}" if study.enqueue_defaults else "enqueue_defaults is off"
        lines.append(f"trial 0   {'the base as it is' if first else f'sampled: {why}'}")
    runs = study.trials * study.seeds + 2 * study.repeats.seeds
    lines.append(
        f"runs      {runs} at most, {study.launch.workers} at a time, {study.launch.ranks} ranks each; "
        f"sampler {study.sampler.kind}, pruner {study.pruner.kind}"
    )
    return "\n".join(lines)


def _values(part: ranges.Range | ranges.Choices) -> str:
    if isinstance(part, ranges.Choices):
        return " | ".join(config_text.write_inline(choice) for choice in part.choices)
    step = f" by {part.step}" if part.step else ", logarithmic" if part.log else ""
    return f"{part.low} to {part.last}{step}"


if __name__ == "__main__":
    sys.exit(main())
