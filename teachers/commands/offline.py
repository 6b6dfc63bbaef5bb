"""The offline cache: a teacher's forward over every row that lacks a target, resumable and in any number of processes.

    run(options, command="python -m teachers cache ...")

Suffix legend: B rows, T tokens a row, N rows of the data.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from herd.data.batches import Batch
from herd.data.packing import PackedRows
from herd.data.streams import batch_of
from herd.llama4 import use_sparse_experts
from herd.llama4.source import open_model
from herd.run import launcher
from herd.run.devices import check_device
from herd.run.errors import Interrupted
from herd.run.files import require_space
from herd.run.lineage import git_commit, read_lineage
from herd.run.progress import Progress
from herd.run.ranks import StopFlag
from herd.run.tracking import Tracker, open_tracker
from teachers import cache
from teachers.commands.job import Job, prepare
from teachers.commands.options import Options
from teachers.commands.sample import sample_bytes
from teachers.frozen import FrozenTeacher


@dataclass(frozen=True)
class Outcome:
    """What this process did."""

    rows: int
    tokens: int
    seconds: float
    teacher_seconds: float
    """Of them in the teacher's forward up to its head; the head's product is made block by block while encoding."""


def run(options: Options, *, command: str) -> None:
    """Make or complete the cache and track it. Raises what a user can mend; Interrupted when told to stop."""
    transformers.utils.logging.disable_progress_bar()
    check_device(options.device, said=f"--device {options.device}")
    job = prepare(options)
    made = cache.create(
        options.out,
        job.identity,
        options.codec,
        seed=options.seed,
        facts=facts_of(options, job),
        more_data=options.complete,
    )
    tracker = _track(options, job)
    try:
        outcome = fill(made, job, options, command=command)
    except Interrupted:
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    result = summary(options.out, outcome)
    tracker.metrics({f"cache/{name}": value for name, value in result.items()}, 0)
    tracker.artifact(options.out / "cache.json")
    tracker.finish()
    if launcher.is_main():
        print(json.dumps(result, indent=1) if options.json else to_text(options.out, result))


def facts_of(options: Options, job: Job) -> dict[str, Any]:
    """What people want to know of a cache, and the command that completes it."""
    return cache.facts(options.model, options.data, part=options.part) | {
        "teacher_name": read_lineage(job.folder).get("name", job.folder.name),
        "git_commit": git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def fill(made: cache.Cache, job: Job, options: Options, *, command: str) -> Outcome:
    """Append a record for every row of this process's share that has none. Raises Interrupted after a whole batch."""
    reader = cache.open(made.folder, expecting=replace(job.identity, data=None))
    step = int(reader.steps_N.max(initial=0))  # completed rows must not be older than those there are
    share_N = job.indices_N[launcher.rank() :: launcher.world_size()]
    missing_N = reader.missing(torch.from_numpy(job.packed.keys_N[share_N].astype(np.int64))).numpy()
    wanted_N = share_N[missing_N]
    before, done, spent, started = len(share_N) - len(wanted_N), 0, 0.0, time.perf_counter()
    if not len(wanted_N):
        return Outcome(0, 0, 0.0, 0.0)
    length, steps = job.identity.sequence_length, -(-len(wanted_N) // options.micro_rows)
    needed = sample_bytes(options.codec, job.identity.vocabulary, length) * len(wanted_N) * length
    require_space(made.folder, int(needed), what=f"the cache {made.folder}")
    teacher = open_teacher(job.folder, options.device)
    with (
        made.writer(f"rank{launcher.rank()}") as writer,
        StopFlag() as stop,
        Progress(total=steps) as progress,
    ):
        for number, batch in enumerate(_batches(job.packed, wanted_N, options.micro_rows), 1):
            began = time.perf_counter()
            targets = teacher.targets(batch.input_ids_BT.to(options.device))
            spent += time.perf_counter() - began
            writer.append(targets, batch.keys_B, batch.input_ids_BT, batch.labels_BT.to(options.device), step=step)
            done += len(batch.keys_B)
            progress.update(number, done * length, {})
            if stop.requested and number < steps:
                break
    if done < len(wanted_N):
        raise Interrupted(f"stopped with {before + done:,} of {len(share_N):,} rows; go on with: {command}")
    return Outcome(done, done * length, time.perf_counter() - started, spent)


def _batches(packed: PackedRows, indices_N: np.ndarray, size: int) -> Iterator[Batch]:
    for start in range(0, len(indices_N), size):
        yield batch_of(packed, indices_N[start : start + size])


def open_teacher(folder: Path, device: str) -> FrozenTeacher:
    """The teacher in the type it was saved in."""
    return FrozenTeacher(use_sparse_experts(open_model(str(folder), dtype="auto")).to(device))


def _track(options: Options, job: Job) -> Tracker:
    """One MLflow run a cache: going on with it is the same run again."""
    settings = {"model": options.model, "part": options.part, "codec": options.codec, "rows": options.rows}
    tracker = open_tracker(
        options.out,
        experiment=options.experiment,
        run_name=f"cache-{options.out.resolve().name}",
        config=settings | {"identity": asdict(job.identity), "data": options.data.model_dump(mode="json")},
        tags={"herd.role": "cache"} | _parent(job.folder),
        enabled=options.tracked,
    )
    tracker.dataset(options.part, options.data.source, job.corpus.fingerprint, options.part)
    return tracker


def _parent(folder: Path) -> dict[str, str]:
    parent = read_lineage(folder).get("run_id")
    return {"mlflow.parentRunId": parent} if parent else {}


def summary(folder: Path, outcome: Outcome) -> dict[str, float]:
    """The whole cache after this process, and this process's speed."""
    reader = cache.open(folder, expecting=None)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    tokens = len(reader) * reader.manifest.identity.sequence_length
    encoding = outcome.seconds - outcome.teacher_seconds
    return {
        "rows": len(reader),
        "rows_added": outcome.rows,
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / max(tokens, 1),
        "teacher_hours": outcome.teacher_seconds / 3600,
        "teacher_tokens_per_second": outcome.tokens / max(outcome.teacher_seconds, 1e-9),
        "encoding_tokens_per_second": outcome.tokens / max(encoding, 1e-9),
    }


def to_text(folder: Path, result: dict[str, float]) -> str:
    """The result for people."""
    speed = (
        f"teacher {result['teacher_tokens_per_second']:,.0f} tok/s, "
        f"encoding and writing {result['encoding_tokens_per_second']:,.0f} tok/s"
    )
    return "\n".join(
        [
            f"rows      {result['rows']:,}, {result['rows_added']:,} of them added now",
            f"tokens    {result['tokens']:,}",
            f"bytes     {result['bytes']:,} ({result['bytes_per_token']:.2f} a token)",
            *([f"speed     {speed}"] if result["rows_added"] else []),
            f"cache     {folder}",
        ]
    )
