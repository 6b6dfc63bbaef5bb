"""One run from its folder to its report: prepare, train, write models; then compress, evaluate and report on rank 0.

run(config, resume="auto", command="deepspeed --module distill --config configs/nano.yaml")
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import transformers

from distill import aftermath, run_record, target_cache
from distill.assembly import Assembly, assemble
from distill.loop import Loop
from herd.run import checkpoints, files, randomness, ranks, store
from herd.run import config as configuration
from herd.run.errors import ConfigError, DataError, EnvironmentFault, HerdError, Interrupted
from herd.run.folders import claimed, make_folder
from herd.run.resume import resolve
from herd.run.schema import Config
from herd.run.tracking import Tracker, open_tracker

CONFIG = "config.yaml"
ELSEWHERE = "move the run to another disk (run.folder)"


def run(config: Config, *, resume: str, command: str) -> None:
    """Train the herd this configuration describes, and everything after it; every rank calls this.

    Raises ConfigError, DataError, NumericalError, EnvironmentFault (DiskFull; the folder was deleted) or Interrupted,
    with MLflow told how it ended.
    """
    target_cache.check_caches(config)
    ranks.initialise()
    transformers.utils.logging.disable_progress_bar()  # a bar a file and rank says nothing
    folder = config.run.folder / config.run.name
    claim = claimed(folder, "run.name") if ranks.is_main() else nullcontext()
    with claim, no_trace_of_a_refusal(config, folder), files.disk_faults(folder, mend=ELSEWHERE):
        ranks.barrier()  # what the folder holds is looked at when it is ours
        if config.tracking.enabled and ranks.is_main():
            store.check(store.resolve_uri(config.tracking.uri))
        resume_from = prepare_folder(config, folder, resume=resume, command=command)
        randomness.seed_everything(config.run.seed, rank=ranks.rank())
        with deletion_told(folder):
            parts = assemble(config, folder)
            with _tracked(config, folder, command) as tracker:  # after it: what is refused is in no store
                _train(parts, config, folder, tracker, resume_from=resume_from, command=command)
                ranks.shut_down()
                if ranks.is_main() and config.run.ends == "reported":
                    aftermath.compress_and_report(config, folder, tracker)
                elif ranks.is_main():
                    run_record.mark(folder, "finished")
                    print(f"trained: {folder}", flush=True)


@contextmanager
def _tracked(config: Config, folder: Path, command: str) -> Iterator[Tracker]:
    """The run in MLflow, told how it ended."""
    tracker = open_tracker(
        folder,
        experiment=config.tracking.experiment,
        run_name=config.run.name,
        uri=config.tracking.uri,
        config=config.model_dump(mode="json"),
        tags=run_tags(config, command),
        enabled=config.tracking.enabled and ranks.is_main(),
    )
    try:
        yield tracker
    except Interrupted:
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")


def run_tags(config: Config, command: str) -> dict[str, str]:
    """Tags of the MLflow run; the parent's is the one by which MLflow's interface nests runs."""
    parent = {"mlflow.parentRunId": config.tracking.parent} if config.tracking.parent else {}
    return {"world_size": str(ranks.world_size()), "command": command} | parent | config.tracking.tags


@contextmanager
def no_trace_of_a_refusal(config: Config, folder: Path) -> Iterator[None]:
    """Remove what this run made if it is refused before its first step: the mended command can be given again.

    That is its folder, and the cache of the teacher that trains in it, which has its id and is of no use to another.
    """
    ours = ranks.is_main() and not folder.exists()
    try:
        yield
    except HerdError:
        if ours and checkpoints.never_stepped(folder):
            for made in (*target_cache.of_trained(config, folder), folder):
                shutil.rmtree(made)
        raise


@contextmanager
def deletion_told(folder: Path) -> Iterator[None]:
    """Name the cause of whatever goes wrong in a run whose folder somebody has deleted under it."""
    try:
        yield
    except Exception as error:
        # Not the folder itself: a checkpoint being written may have made it anew.
        if (folder / CONFIG).exists() or isinstance(error, Interrupted):
            raise
        raise EnvironmentFault(
            f"{folder} was deleted while the run was writing to it; what was in it is lost: start the run again"
        ) from error


def _train(
    parts: Assembly, config: Config, folder: Path, tracker: Tracker, *, resume_from: Path | None, command: str
) -> None:
    for name, (source, fingerprint) in parts.origins(config).items():
        tracker.dataset(name, source=source, digest=fingerprint, context="training")
        heldout = "heldout" if name == "train" else f"{name}-heldout"
        tracker.dataset(heldout, source=source, digest=fingerprint, context="heldout")
    loop = Loop(parts, config, folder, tracker)
    steps = loop.run(resume_from=resume_from, resume_command=f"{without_resume(command)} --resume auto")
    parts.herd.close()
    _write_models(parts, config, folder, tracker)
    if ranks.is_main():
        run_record.mark(folder, "trained", again=steps > 0)


def _write_models(parts: Assembly, config: Config, folder: Path, tracker: Tracker) -> None:
    for name, member in parts.herd.members.items():
        target = folder / "teacher" if name == "teacher" else folder / "students" / name
        member.export(target, tokenizer=parts.tokenizer)
        if ranks.is_main():
            aftermath.describe_model(target, name, config, parts, tracker)
    ranks.barrier()


def prepare_folder(config: Config, folder: Path, *, resume: str, command: str) -> Path | None:
    """Create or reopen the run folder; returns the checkpoint to start from, on every rank the same."""
    checkpoint = resolve(folder, resume)
    if checkpoint is not None:
        _check_same_world(checkpoint)
    if resume != "never" and (folder / CONFIG).exists():
        _check_same_config(folder / CONFIG, config)
    ranks.barrier()
    if ranks.is_main():
        make_folder(folder, "run.folder")
        checkpoints.clean(folder)
        if checkpoint is not None and checkpoint.resolve().is_relative_to(folder.resolve()):
            for moved in checkpoints.set_aside_later(folder / checkpoints.FOLDER / checkpoint.name):
                print(f"set aside, as the run goes on from {checkpoint.name}: {moved}", file=sys.stderr, flush=True)
        files.write_atomic(folder / CONFIG, configuration.dump(config))
        run_record.begin(folder, command)
    ranks.barrier()
    return checkpoint


def _check_same_config(path: Path, config: Config) -> None:
    changes = configuration.blocking_changes(configuration.load(path, []), config)
    if changes:
        listed = "\n".join(f"  {line}" for line in changes)
        raise ConfigError(
            f"run.name = {config.run.name}: its configuration changed since it started:\n{listed}\n"
            "  undo the change, or start another run with --set run.name=NEW"
        )


def _check_same_world(checkpoint: Path) -> None:
    wrote = checkpoints.facts(checkpoint)["world_size"]
    if wrote != ranks.world_size():
        raise DataError(
            f"{checkpoint} was written by {wrote} {'rank' if wrote == 1 else 'ranks'}, this run has "
            f"{ranks.world_size()}: start it on {wrote} (deepspeed --num_accelerators {wrote}, on one machine), or "
            "start another run with --set run.name=NEW"
        )


def without_resume(command: str) -> str:
    """The command with any --resume and its value taken out."""
    words = command.split()
    kept = [w for i, w in enumerate(words) if w != "--resume" and (i == 0 or words[i - 1] != "--resume")]
    return " ".join(w for w in kept if not w.startswith("--resume="))
