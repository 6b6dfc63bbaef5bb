"""What targets cost online, written through and offline, against students and epochs, from costs measured here.

    OMP_NUM_THREADS=1 python benchmarks/break_even.py [--rounds 9] [--plot-only]

Four costs a token are measured in CPU seconds on the nano herd, by real steps of the trainer taken in turn; the rest is
the formula of `python -m teachers cache --dry-run`. Writes benchmarks/results/break_even.json, docs/img/break_even.png.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache_training import WARM_UP, build, take_step, write_cache

from distill.assembly import Assembly
from herd.report.style import INK, WIDE, new_figure, settle, styled
from herd.run import ranks
from herd.run.files import write_atomic
from teachers import cache
from teachers.commands.ways import EACH, OFFLINE, TOGETHER, WRITE_THROUGH, Work, work
from teachers.frozen import FrozenTeacher

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "break_even.json"
PICTURE = ROOT / "docs" / "img" / "break_even.png"
COLOURS = {TOGETHER: "#0072b2", EACH: "#d55e00", WRITE_THROUGH: "#009e73", OFFLINE: "#aa4499"}
COUNTS = (1, 2, 3, 4, 6, 8)


def teacher_costs(parts: Assembly, path: Path, first: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds a token of its forward, and of storing what came out."""
    teacher = FrozenTeacher(parts.herd.teacher.learner.model)
    manifest = cache.open(path, expecting=None).manifest
    made = cache.create(path.with_name("again"), manifest.identity, manifest.codec)
    seconds: dict[str, list[float]] = {"forward": [], "encode": []}
    with made.writer("bench") as writer:
        for step in range(first, first + WARM_UP + rounds):
            rows = parts.herd.config.batch.rows
            (batch,) = parts.rows.take(step, rows=rows, micro_rows=rows, rank=0, world=1)
            marks = [time.process_time()]
            targets = teacher.targets(batch.input_ids_BT)
            marks.append(time.process_time())
            writer.append(targets, batch.keys_B, batch.input_ids_BT, batch.labels_BT, step=0)
            marks.append(time.process_time())
            for place, name in enumerate(seconds):
                seconds[name].append((marks[place + 1] - marks[place]) / batch.labels_BT.numel())
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def step_costs(path: Path, scratch: Path, first: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds a token of a student's step on labels, with a frozen teacher, and from the cache; in turn."""
    runs = {
        "labels": build("none", scratch),
        "frozen": build("frozen", scratch),
        "cached": build("cached", scratch, f"teacher.cache={{path: {path}}}"),
    }
    config = runs["labels"].herd.config
    tokens = config.batch.rows * config.data.sequence_length
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(first, first + WARM_UP + rounds):
        for name, parts in runs.items():
            seconds[name].append(take_step(parts, step)[1] / tokens)
    runs["cached"].herd.close()
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def measure(rounds: int, teacher_steps: int) -> dict[str, Any]:
    """Costs of a token: of each part of Work in CPU seconds, and bytes on disk; with all measurements."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "cache"
        writers = write_cache(path, Path(scratch), teacher_steps=teacher_steps, steps=WARM_UP + rounds)
        config = writers.herd.config
        stored = len(cache.open(path, expecting=None)) * config.data.sequence_length
        size = sum(file.stat().st_size for file in path.iterdir())
        samples = teacher_costs(writers, path, teacher_steps, rounds)
        samples |= step_costs(path, Path(scratch), teacher_steps, rounds)
    of = {name: statistics.median(values) for name, values in samples.items()}
    costs = {
        "forwards": of["forward"],
        "encodes": of["encode"],
        "uses": max(0.0, of["frozen"] - of["labels"] - of["forward"]),
        "reads": max(0.0, of["cached"] - of["labels"]),
    }
    return {"seconds_a_token": costs, "step_s": of["labels"], "bytes_a_token": size / stored, "samples": samples}


def total(costs: dict[str, float], done: Work) -> float:
    """CPU seconds for a million tokens of text."""
    return 1e6 * sum(costs[name] * times for name, times in asdict(done).items())


def table(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Every way at every number of students and epochs: forwards, bytes and seconds for a million tokens of text."""
    return [
        {
            "students": students,
            "epochs": epochs,
            "way": way,
            "teacher_forwards": done.forwards,
            "megabytes": measured["bytes_a_token"] * (done.encodes > 0),
            "cpu_s": total(measured["seconds_a_token"], done),
        }
        for epochs in COUNTS
        for students in COUNTS
        for way, done in work(students=students, epochs=epochs).items()
    ]


def draw(rows: list[dict[str, Any]]) -> None:
    """Seconds against students at one epoch, and against epochs with three students."""
    panels = (("students", "epochs", 1, "students, 1 epoch each"), ("epochs", "students", 3, "epochs of 3 students"))
    with styled(WIDE):
        figure = new_figure(WIDE, 3.6)
        axes = figure.subplots(1, 2)
        for axis, (x, fixed, value, label) in zip(axes, panels, strict=True):
            for way, colour in COLOURS.items():
                line = [row for row in rows if row[fixed] == value and row["way"] == way]
                axis.plot(
                    [row[x] for row in line], [row["cpu_s"] for row in line], color=colour, label=way, marker="o", ms=3
                )
            axis.set_xlabel(label)
            axis.set_ylim(bottom=0)
        axes[0].set_ylabel("CPU seconds")
        axes[0].legend(frameon=False)
        figure.suptitle(
            "Cost of the targets for a million tokens of text", x=0.01, ha="left", fontweight="bold", color=INK
        )
        PICTURE.parent.mkdir(exist_ok=True)
        settle(figure).savefig(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--teacher-steps", type=int, default=6, help="before the teacher's targets are kept")
    parser.add_argument("--plot-only", action="store_true", help="draw the results that are there")
    arguments = parser.parse_args()
    if arguments.plot_only:
        measured = json.loads(RESULTS.read_text())["measured"]
    else:
        ranks.initialise()
        measured = measure(arguments.rounds, arguments.teacher_steps)
    rows = table(measured)
    write_atomic(RESULTS, json.dumps({"measured": measured, "rows": rows}, indent=1) + "\n")
    draw(rows)
    step, costs = measured["step_s"], measured["seconds_a_token"]
    print(f"a student's step on labels alone: {1e6 * step:,.0f} CPU seconds a million tokens")
    for name, seconds in costs.items():
        print(f"  {name:9} {1e6 * seconds:8,.1f}  ({seconds / step:.3f} of the step)")
    print(f"  bytes     {measured['bytes_a_token']:8,.1f} a token")


if __name__ == "__main__":
    main()
