"""Teacher forwards saved: one co-distillation step against the same work as separate runs, for 1, 2 and 4 students.

    OMP_NUM_THREADS=1 python benchmarks/codistillation.py [--rounds 7]

Separate runs are the teacher's own training step and, for each student, a step with a frozen copy of that teacher.
All are real steps of the trainer on nano models and text, interleaved, in CPU seconds of this one process.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from distill.assembly import Assembly, assemble
from herd.run import ranks
from herd.run.config import load

ROOT = Path(__file__).resolve().parents[1]
COUNTS = (1, 2, 4)


def build(mode: str, students: dict[str, str], folder: Path) -> Assembly:
    """A herd of these students in this teacher mode, everything else as configs/nano.yaml has it."""
    config = load(ROOT / "configs" / "nano.yaml", [f"teacher.mode={mode}", "teacher.head_start=0"])
    named = {name: config.students["scout"].model_copy(update={"source": source}) for name, source in students.items()}
    return assemble(config.model_copy(update={"students": named}), folder)


def seconds(parts: Assembly, step: int) -> float:
    """CPU seconds of one optimiser step."""
    batches = parts.rows.take(step, rows=parts.herd.config.batch.rows, micro_rows=parts.micro_rows, rank=0, world=1)
    started = time.process_time()
    parts.herd.take_step(batches, step)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    ranks.initialise()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        teacher_alone = build("none", {"teacher_run": "behemoth-nano"}, folder)
        one_student = build("frozen", {"s0": "scout-nano"}, folder)
        for count in COUNTS:
            together = build("codistill", {f"s{i}": "scout-nano" for i in range(count)}, folder)
            joint, apart = [], []
            for step in range(rounds + 1):
                timed = seconds(together, step), seconds(teacher_alone, step), seconds(one_student, step)
                if step > 0:  # the first step allocates
                    joint.append(timed[0])
                    apart.append(timed[1] + count * timed[2])
            ratios = [a / j for a, j in zip(apart, joint, strict=True)]
            row = {
                "students": count,
                "together_s": statistics.median(joint),
                "apart_s": statistics.median(apart),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "teacher_forwards_together": 1,
                "teacher_forwards_apart": 1 + count,
            }
            rows.append(row)
            print(
                f"{count} students: together {row['together_s']:.2f} s, apart {row['apart_s']:.2f} s, "
                f"apart / together {row['ratio']:.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]; "
                f"teacher forwards 1 instead of {1 + count}"
            )
    target = ROOT / "benchmarks" / "results" / "codistillation.json"
    target.write_text(json.dumps({"rounds": rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
