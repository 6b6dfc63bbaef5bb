"""The command line of `python -m teachers cache`, checked before anything heavy is imported."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herd.run import cli, launcher
from herd.run.errors import ConfigError
from herd.run.schema import Data

DESCRIPTION = (
    "Run a teacher over a data source once and keep sparse targets of every row, for any number of students.\n"
    "Started again it goes on where it was stopped or killed. Under a launcher every rank takes its share of the rows."
)
EXAMPLES = (
    "python -m teachers cache --model runs/nano/teacher --data stdlib --out caches/nano",
    "python -m teachers cache --model runs/nano/teacher --out caches/nano --complete",
    "python -m teachers cache --model behemoth --tokens 1e12 --students 3 --out caches/b --dry-run --world-size 64",
    "torchrun --nproc_per_node 4 -m teachers cache --model DIR --data SOURCE --out caches/big",
)
CODEC = "head_and_tail=14"


@dataclass(frozen=True)
class Options:
    """What to cache, of which teacher, how."""

    model: str
    data: Data
    out: Path
    part: str
    rows: int | None
    order_seed: int
    codec: str
    temperature: float
    seed: int
    complete: bool
    micro_rows: int
    device: str
    students: int
    epochs: int
    tokens: int | None
    tokens_per_second: float | None
    world_size: int
    mfu: float
    json: bool
    experiment: str
    tracked: bool


def parser() -> argparse.ArgumentParser:
    """The flags."""
    out = cli.parser("teachers cache", description=DESCRIPTION, examples=EXAMPLES, config=False, dry_run=True)
    add = out.add_argument
    add("--model", required=True, metavar="DIR", help="the teacher: a model folder or a hub id (planning: also a spec)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the cache")
    add("--data", metavar="SOURCE", help="stdlib, a file or folder, or a hub dataset (default: what it was trained on)")
    add("--part", choices=("train", "heldout", "calibration"), default="train", help="part of the data (train)")
    add("--sequence-length", type=int, metavar="T", help="tokens a row (default: as in training, else 256)")
    add("--rows", type=int, metavar="N", help="only the first N rows in training order (default: all)")
    add("--order-seed", type=int, default=0, metavar="N", help="run.seed of that order (0)")
    add("--codec", metavar="NAME=N", help=f"head_and_tail=N, rs_kd=N or top_k=N classes a token ({CODEC})")
    add("--temperature", type=float, metavar="X", help="of the targets (1.0)")
    add("--seed", type=int, metavar="N", help="of the random choices (0)")
    add("--complete", action="store_true", help="fill in rows the cache in --out lacks, also of further data")
    add("--micro-rows", type=int, default=4, metavar="N", help="rows of a forward (4)")
    add("--device", default="cpu", help="where the teacher runs, such as cuda (cpu)")
    add("--students", type=int, default=2, metavar="N", help="planning: students that will read it (2)")
    add("--epochs", type=int, default=1, metavar="N", help="planning: times a student reads the data (1)")
    add("--tokens", type=float, metavar="N", help="planning: size of the data, in place of counting it")
    add("--tokens-per-second", type=float, metavar="X", help="planning: the teacher's measured speed, forward alone")
    add("--json", action="store_true", help="print the result as JSON")
    add("--experiment", default="herd", metavar="NAME", help="MLflow experiment (herd)")
    add("--no-tracking", action="store_true", help="do not track this command in MLflow")
    return out


def check(given: argparse.Namespace) -> Options:
    """Everything that can be refused early; with --complete what the cache knows is taken from it."""
    least = {"rows": 1, "order_seed": 0, "seed": 0, "micro_rows": 1, "students": 1, "epochs": 1, "tokens": 1}
    for name, lowest in {**least, "sequence_length": 8}.items():
        value = getattr(given, name)
        if value is not None and not lowest <= value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} = {value:g}: must be at least {lowest}")
    for name in ("temperature", "tokens_per_second"):
        value = getattr(given, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} = {value:g}: must be more than 0")
    _check_places(given)
    known = _known(given)
    return Options(
        model=given.model,
        data=_data(given, known),
        out=given.out,
        part=given.part,
        rows=given.rows,
        order_seed=given.order_seed,
        codec=known["codec"],
        temperature=known["temperature"],
        seed=known["seed"],
        complete=given.complete,
        micro_rows=given.micro_rows,
        device=given.device,
        students=given.students,
        epochs=given.epochs,
        tokens=None if given.tokens is None else int(given.tokens),
        tokens_per_second=given.tokens_per_second,
        world_size=given.world_size,
        mfu=given.mfu,
        json=given.json,
        experiment=given.experiment,
        tracked=not given.no_tracking,
    )


def _check_places(given: argparse.Namespace) -> None:
    if not given.dry_run and not Path(given.model).is_dir() and given.model.count("/") != 1:
        raise ConfigError(f"--model {given.model}: no such folder; give the folder of a saved model or a hub id")
    if given.out.exists() and not given.out.is_dir():
        raise ConfigError(f"--out {given.out}: is a file; give a folder")
    if given.complete and not (given.out / "cache.json").is_file():
        raise ConfigError(f"--out {given.out}: no cache.json in it to complete; leave out --complete to make a cache")
    if launcher.world_size() > 1 and given.dry_run:
        raise ConfigError("--dry-run: one process plans for any number; give --world-size and leave out the launcher")


def _known(given: argparse.Namespace) -> dict[str, Any]:
    """Codec, temperature, seed and length: of the cache to complete where not given, else the defaults."""
    there = {"codec": CODEC, "temperature": 1.0, "seed": 0, "sequence_length": None}
    if given.complete:
        from teachers.cache.manifest import Manifest

        manifest = Manifest.read(given.out)
        there = {
            "codec": manifest.codec,
            "temperature": manifest.identity.temperature,
            "seed": manifest.seed,
            "sequence_length": manifest.identity.sequence_length,
            "data_config": manifest.facts.get("data_config"),
        }
    return there | {name: getattr(given, name) for name in there if getattr(given, name, None) is not None}


def _data(given: argparse.Namespace, known: dict[str, Any]) -> Data:
    """Where the rows come from: the command line, else the cache that is completed, else the teacher's training."""
    from herd.run.lineage import read_lineage

    there = (known.get("data_config"), read_lineage(Path(given.model)).get("data_config"))
    found = [Data.model_validate(settings) for settings in there if settings] or [Data()]
    settings = next((one for one in found if given.data in one.sources), found[0])
    if given.data in settings.sources:
        settings = settings.alone(given.data)
    elif settings.sources and given.data is None:
        raise ConfigError(f"--data: rows of one source at a time; give one of {', '.join(settings.sources)}")
    elif given.data is not None and (settings.sources or given.data != settings.source):
        settings = Data(source=given.data, sequence_length=settings.sequence_length)
    length = known["sequence_length"]
    return settings if length is None else settings.model_copy(update={"sequence_length": length})
