"""`python -m sweeps scale --from STUDY.yaml --to BIG.yaml`: a study's best settings as the large run's configuration.

main(["--from", "configs/sweeps/rates.yaml", "--to", "configs/maverick.yaml"]) returns the exit code
"""

import tempfile
from pathlib import Path

from herd.llama4.specs import find_spec
from herd.run import cli, config, config_text
from herd.run.errors import ConfigError
from herd.run.files import write_atomic
from herd.run.folders import check_folder, make_folder
from herd.run.schema import Config
from herd.run.store import shown
from sweeps import annotated, settings
from sweeps.settings import Study

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
    add("--fit", type=Path, metavar="FILE", help="transfer.json of a transfer check: its exponents, its findings")
    add("--world-size", type=int, metavar="N", help="ranks to plan for (by default as many as spread the experts)")
    parser.set_defaults(dry_run=True)  # --world-size plans, and a plan is all that is made here
    arguments = parser.parse_args(argv)

    def body() -> None:
        study = settings.load(arguments.study, arguments.set, flag="--from")
        large = config.load(arguments.to, flag="--to")
        world_size = large.parallel.expert_parallel if arguments.world_size is None else arguments.world_size
        if world_size < 1:
            raise ConfigError(f"--world-size {world_size}: must be 1 or more")
        again = f"run it first: python -m sweeps --study {arguments.study}"
        out = arguments.out or study.home / arguments.to.name
        scaled = write(study, arguments.to, out, fit=arguments.fit, again=again)
        from distill import plan

        plan.show_plans(scaled, plan.plan_run(scaled, world_size=world_size), world_size=world_size, mfu=MFU)

    return cli.main_guard(body)


def write(study: Study, to: Path, out: Path, *, fit: Path | None = None, again: str = "run it first") -> Config:
    """Write `out`, after it has been checked as the trainer would; returns it. Raises ConfigError or DataError.

    again: how to run the study, for the message that it has not.
    """
    from sweeps import scaling

    number, overrides = best_of(study, again)
    if out.is_dir():
        raise ConfigError(f"--out {out}: a folder; name the file to write")
    check_folder(out.parent, "--out")
    small, large = config.load(study.base, [*study.set, *overrides]), config.load(to, flag="--to")
    found = {path: config_text.parse(value) for path, _, value in (text.partition("=") for text in overrides)}
    tree = config_text.parse(to.read_text(encoding="utf-8"))
    who = f"trial {number} of {study.name}"
    scaled = scaling.carry(found, small, large, tree, who=who, fit=scaling.Fit.read(fit) if fit else None)
    header = f"{to.name} with the settings of {who}, carried over: python -m sweeps scale"
    text = annotated.write(scaled.tree, scaled.notes, header=header)
    made = _validated(text, to)
    check_rules(made)
    make_folder(out.parent, "--out")
    write_atomic(out, text)
    print(f"{out}: {who}")
    return made


def best_of(study: Study, again: str) -> tuple[int, list[str]]:
    """Number and overrides of the study's best trial. ConfigError when it has not run, or no trial is complete.

    again: the mend, a command that runs it.
    """
    import optuna

    from sweeps import results, storages

    storages.quiet()
    url, file = study.storage_url, study.storage_file
    missing = f"--from {study.name}: no such study in {shown(url)}; {again}"
    if file is not None and not file.exists():
        raise ConfigError(missing)
    storage = storages.patiently(lambda: storages.open_storage(url), url)
    try:
        found = storages.patiently(lambda: optuna.load_study(study_name=study.name, storage=storage), url)
    except KeyError:
        raise ConfigError(missing) from None
    best = results.read(study, found).best
    if best is None:
        raise ConfigError(f"--from {study.name}: no trial is complete yet; {again}")
    return best.number, list(best.overrides)


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
        return config.load(path)
