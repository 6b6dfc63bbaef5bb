"""`python -m sweeps scale --from STUDY.yaml --to BIG.yaml`: a study's best settings as the large run's configuration.

main(["--from", "configs/sweeps/rates.yaml", "--to", "configs/maverick.yaml"]) returns the exit code
"""

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from herd.llama4.specs import find_spec
from herd.run import cli, config, config_text
from herd.run.errors import ConfigError
from herd.run.files import write_atomic
from herd.run.folders import check_folder, make_folder
from herd.run.schema import Config
from herd.run.store import shown
from sweeps import annotated, settings
from sweeps.settings import Study

if TYPE_CHECKING:
    from herd.llama4.plan import Plan

DESCRIPTION = """Write the configuration of a large run with what a study found at small size: rates, decay, epsilon and
initial spread by the rules of hyperparameter transfer, each with the rule and the fit behind it, and print its cost."""
EXAMPLES = (
    "python -m sweeps scale --from configs/sweeps/rates.yaml --to configs/maverick.yaml --world-size 512",
    "python -m sweeps scale --from STUDY.yaml --to configs/scout.yaml --fit runs/sweeps/transfer/transfer.json",
)
MFU = 0.4


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = cli.parser("sweeps scale", description=DESCRIPTION, examples=EXAMPLES, config=False)
    add = parser.add_argument
    add("--from", dest="study", required=True, type=Path, metavar="STUDY", help="YAML of a study that has run")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the study; repeatable")
    add("--to", required=True, type=Path, metavar="FILE", help="YAML of the large run")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="what to write, in a folder that is made if need be (by default TO's name, in the study's folder)",
    )
    add("--trial", type=int, metavar="N", help="which trial to carry (by default the best)")
    add("--fit", type=Path, metavar="FILE", help="transfer.json of a transfer check: its exponents, its findings")
    add("--world-size", type=int, metavar="N", help="ranks to plan for (by default as many as spread the experts)")
    parser.set_defaults(dry_run=True)  # --world-size plans, and a plan is all that is made here
    arguments = parser.parse_args(argv)

    def body() -> None:
        study = settings.load(arguments.study, arguments.set, flag="--from")
        check_kind(arguments.to)
        large = config.load(arguments.to, flag="--to")
        world_size = large.parallel.expert_parallel if arguments.world_size is None else arguments.world_size
        if world_size < 1:
            raise ConfigError(f"--world-size {world_size}: must be 1 or more")
        words = "".join(f" --set {shlex.quote(word)}" for word in arguments.set)
        again = f"python -m sweeps --study {arguments.study}{words}"
        out = arguments.out or study.home / arguments.to.name
        scaled, plans = write(
            study, arguments.to, out, fit=arguments.fit, trial=arguments.trial, again=again, world_size=world_size
        )
        from distill import plan

        plan.show_plans(scaled, plans, world_size=world_size, mfu=MFU)

    return cli.main_guard(body)


def write(
    study: Study,
    to: Path,
    out: Path,
    *,
    fit: Path | None = None,
    trial: int | None = None,
    again: str = "",
    world_size: int | None = None,
) -> tuple[Config, "dict[str, Plan]"]:
    """Write `out`, after it has been checked as the trainer would; returns it and what it is planned to cost.

    Raises ConfigError or DataError.

    trial: which one; by default the best. again: the command that runs the study, for the message that it has not.
    world_size: ranks that the cost in its head is of, by default as many as spread the experts.
    """
    from distill import plan
    from sweeps import scaling

    number, overrides = found_by(study, trial, again)
    if out.is_dir():
        raise ConfigError(f"--out {out}: a folder; name the file to write")
    check_folder(out.parent, "--out")
    small, large = config.load(study.base, [*study.set, *overrides]), config.load(to, flag="--to")
    found = {path: config_text.parse(value) for path, _, value in (text.partition("=") for text in overrides)}
    tree = config_text.parse(to.read_text(encoding="utf-8"))
    who = f"trial {number} of {study.name}"
    scaled = scaling.carry(found, small, large, tree, who=who, fit=scaling.Fit.read(fit) if fit else None)
    header = f"{to.name} with the settings of {who}, carried over: python -m sweeps scale"
    made = _validated(annotated.write(scaled.tree, scaled.notes), to)
    check_rules(made)
    ranks = world_size or made.parallel.expert_parallel
    plans = plan.plan_run(made, world_size=ranks)
    costs = plan.costs(made, plans, world_size=ranks, mfu=MFU)
    text = annotated.write(scaled.tree, scaled.notes, header="\n".join([header, "Planned cost:", *costs]))
    make_folder(out.parent, "--out")
    write_atomic(out, text)
    print(f"{out}: {who}")
    return made, plans


def found_by(study: Study, wanted: int | None, again: str) -> tuple[int, list[str]]:
    """Number and overrides of a complete trial, by default the best.

    Raises ConfigError when the study has not run, ran with other settings than it has now, or has no such trial; and
    when several trials of several objectives are best and none is named. again: the mend, a command that runs it.
    """
    from sweeps import results, storages

    found = storages.find_study(study, config.load(study.base, study.set, flag="base"))
    if found is None:
        raise ConfigError(f"--from {study.name}: no such study in {shown(study.storage_url)}; run it first: {again}")
    result = results.read(study, found)
    if result.best is None:
        counts = f"{len(result.trials)} of {study.trials} trials have ended, none of them complete"
        raise ConfigError(f"--from {study.name}: {counts}; go on with it, or mend its base: {again}")
    if wanted is None and len(result.front) > 1:
        numbers = ", ".join(str(trial.number) for trial in result.front)
        raise ConfigError(
            f"--from {study.name}: several trials are best, each in its way; give --trial, one of {numbers}"
        )
    complete = {trial.number: trial for trial in result.trials if trial.state == "complete"}
    chosen = result.best.number if wanted is None else wanted
    if chosen not in complete:
        raise ConfigError(f"--trial {chosen}: no complete trial of {study.name}; the best is {result.best.number}")
    return chosen, list(complete[chosen].overrides)


def check_kind(path: Path) -> None:
    """Raise ConfigError for a study in place of a run's configuration."""
    if path.is_file() and settings.read_tree(path, wanted="a run's configuration", flag="--to").keys() & {"space"}:
        raise ConfigError(
            f"--to {path}: a study; give the configuration of the large run, such as configs/maverick.yaml"
        )


def check_rules(made: Config) -> None:
    """Raise ConfigError where a model's rules cannot be made: the trainer would, but only once it has built it."""
    from distill.transferred import transferred_of

    for name, model in {"teacher": made.teacher, **made.students}.items():
        if model.transfer is not None:
            transferred_of(made, name, find_spec(model.source).config(**model.overrides))


def _validated(text: str, to: Path) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / to.name
        path.write_text(text, encoding="utf-8")
        try:
            return config.load(path)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(path), f"--to {to} with the trial's settings")) from None
