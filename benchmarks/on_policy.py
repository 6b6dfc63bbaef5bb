"""On-policy distillation: what the key-value cache saves, and what learning from its own rows does to a student.

    OMP_NUM_THREADS=1 python benchmarks/on_policy.py --part speed
    OMP_NUM_THREADS=1 python benchmarks/on_policy.py --part quality --teacher FOLDER [--seeds 3] [--steps 40]

Quality: one young nano Scout goes on with the same frozen teacher in several ways. What was run is not run again.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from distill.assembly import Assembly, assemble
from distill.rollouts import continue_rows, draw, uniforms, write_batches
from herd.data.batches import Batch
from herd.llama4.experts import use_sparse_experts
from herd.llama4.model import build
from herd.run import ranks
from herd.run.config import load
from herd.run.schema import OnPolicy

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "on-policy"
RESULTS = ROOT / "benchmarks" / "results" / "on_policy.json"
CONFIG = ROOT / "configs" / "experiments" / "student.yaml"
PROMPT, LENGTH = 64, 256
YOUNG_STEPS = 200
COMMON = ("loss.weighting={kind: constant, alpha: 0.9}", "run.evaluate_every=0", "data.heldout_rows=48")
REVERSE = "loss.divergence=reverse_kl"
WAYS = {
    "reads, forward KL": (),
    "reads, reverse KL": (REVERSE,),
    "writes half, reverse KL": (REVERSE, "objective={kind: on_policy, fraction: 0.5}"),
    "writes all, reverse KL": (REVERSE, "objective={kind: on_policy, fraction: 1.0}"),
}
PROBE = OnPolicy(kind="on_policy", prompt_tokens=PROMPT)
PROBE_SEED = (123_456_789, 0)  # the same for every student measured, and none a run draws


def uncached(model: torch.nn.Module, prompts_BP: torch.Tensor, *, tokens: int, choose: Callable) -> torch.Tensor:
    """What `continue_rows` does, with a whole forward for every token."""
    ids_BT = prompts_BP
    with torch.no_grad():
        for number in range(tokens):
            logits_BV = model(input_ids=ids_BT, use_cache=False, logits_to_keep=1).logits[:, -1]
            ids_BT = torch.cat([ids_BT, choose(logits_BV, number)[:, None]], 1)
    return ids_BT[:, prompts_BP.shape[1] :]


def time_writing(spec: str, rows: int, *, rounds: int) -> dict:
    """Tokens per CPU second, with and without the cache, interleaved; prompts of 64 in rows of 256, bf16."""
    model = use_sparse_experts(build(spec, dtype=torch.bfloat16, seed=0)).eval()
    prompts_BP = torch.randint(0, model.config.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    count = LENGTH + 1 - PROMPT
    chances_BN = uniforms(torch.arange(rows), count, seed=(0, 0))

    def choose(logits_BV: torch.Tensor, number: int) -> torch.Tensor:
        return draw(logits_BV, chances_BN[:, number], temperature=1.0)

    speeds: dict[str, list[float]] = {"cached": [], "uncached": []}
    for round_number in range(rounds + 1):
        for name, write in (("cached", continue_rows), ("uncached", uncached)):
            tokens = count if round_number else 8  # the first round warms up
            started = time.process_time()
            write(model, prompts_BP, tokens=tokens, choose=choose)
            if round_number:
                speeds[name].append(rows * count / (time.process_time() - started))
    ratios = [c / u for c, u in zip(speeds["cached"], speeds["uncached"], strict=True)]
    medians = {f"{name}_tokens_per_s": statistics.median(values) for name, values in speeds.items()}
    row = {"model": spec, "rows": rows, **medians, "ratio": statistics.median(ratios), "ratios": ratios}
    print(
        f"{spec:14} {rows:3} rows: {row['cached_tokens_per_s']:7.0f} tokens/s cached, "
        f"{row['uncached_tokens_per_s']:6.0f} uncached, ratio {row['ratio']:.1f}",
        flush=True,
    )
    return row


def open_run(name: str, teacher: Path, *settings: str) -> tuple[Assembly, Path]:
    """A run of the experiments' student with this frozen teacher."""
    frozen = ("teacher.mode=frozen", f"teacher.source={teacher}", "teacher.lr=null")
    config = load(CONFIG, [f"run.folder={RUNS}", f"run.name={name}", *frozen, *COMMON, *settings])
    folder = RUNS / name
    folder.mkdir(parents=True, exist_ok=True)
    return assemble(config, folder), folder


def train(parts: Assembly) -> float:
    """All steps of the run; returns median CPU seconds of one."""
    config, seconds = parts.herd.config, []
    for step in range(config.run.steps):
        batches = parts.rows.take(step, rows=config.batch.rows, micro_rows=parts.micro_rows, rank=0, world=1)
        started = time.process_time()
        parts.herd.take_step(batches, step)
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


@torch.no_grad()
def measure(parts: Assembly) -> dict[str, float]:
    """On held-out text: CE and KL(teacher || student). On the student's continuations of it: KL(student || teacher)."""
    student, teacher = parts.herd.pupils["scout"].member.learner.model.eval(), parts.herd.teacher.model
    own = write_batches(student, parts.heldout, PROBE, vocabulary=len(parts.tokenizer), seed=PROBE_SEED)
    text = [compare(student, teacher, batch) for batch in parts.heldout]
    samples = [compare(student, teacher, batch) for batch in own]
    mean = lambda values: torch.cat(values).mean().item()  # noqa: E731
    student.train()
    return {
        "heldout_ce": mean([one["ce"] for one in text]),
        "heldout_forward_kl": mean([one["forward_kl"] for one in text]),
        "sample_reverse_kl": mean([one["reverse_kl"] for one in samples]),
        "sample_teacher_logprob": -mean([one["teacher_ce"] for one in samples]),
        "sample_entropy": mean([one["entropy"] for one in samples]),
    }


def compare(student: torch.nn.Module, teacher: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Per scored token, float64, from whole logits."""
    valid, labels = batch.labels_BT != -100, batch.labels_BT.clamp_min(0)[..., None]
    log_q, log_p = (
        model(input_ids=batch.input_ids_BT, use_cache=False).logits.double().log_softmax(-1)
        for model in (student, teacher)
    )
    q = log_q.exp()
    values = {
        "ce": -log_q.gather(-1, labels).squeeze(-1),
        "teacher_ce": -log_p.gather(-1, labels).squeeze(-1),
        "forward_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "entropy": -(q * log_q).sum(-1),
    }
    return {name: value[valid] for name, value in values.items()}


def once(path: Path, make: Callable[[], dict]) -> dict:
    """What `make` returned when this was first asked for."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def young_student(teacher: Path) -> tuple[Path, dict]:
    """The folder of a student that has read for 200 steps, and its measurements."""
    folder = RUNS / "young" / "student"

    def make() -> dict:
        parts, _ = open_run("young", teacher, f"run.steps={YOUNG_STEPS}")
        train(parts)
        parts.herd.pupils["scout"].member.export(folder, tokenizer=parts.tokenizer)
        return measure(parts)

    return folder, once(RUNS / "young" / "measured.json", make)


def go_on(way: str, seed: int, teacher: Path, student: Path, steps: int) -> dict:
    """Measurements of the student after `steps` more of them, this way."""
    name = f"{way.replace(', ', '-').replace(' ', '-')}-{steps}-{seed}"

    def make() -> dict:
        more = (f"run.steps={steps}", f"run.seed={seed}", f"students.scout.source={student}", "optim.lr=1e-3")
        parts, _ = open_run(name, teacher, *more, *WAYS[way])
        return {"way": way, "seed": seed, "step_cpu_s": train(parts), **measure(parts)}

    result = once(RUNS / name / "measured.json", make)
    print(name, {key: round(value, 4) for key, value in result.items() if isinstance(value, float)}, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("speed", "quality"), required=True)
    parser.add_argument("--teacher", type=Path, help="folder of a trained teacher (quality)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.part == "speed":
        sizes = [("scout-nano", rows) for rows in (2, 8, 32)] + [("maverick-nano", 8)]
        found: list | dict = [time_writing(spec, rows, rounds=arguments.rounds) for spec, rows in sizes]
    else:
        if arguments.teacher is None:
            parser.error("--part quality needs --teacher FOLDER")
        ranks.initialise()
        student, before = young_student(arguments.teacher)
        seeds = range(1, arguments.seeds + 1)
        after = [go_on(way, seed, arguments.teacher, student, arguments.steps) for seed in seeds for way in WAYS]
        found = {"steps": arguments.steps, "before": before, "after": after}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {arguments.part: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
