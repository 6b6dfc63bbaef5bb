"""What pruning saves of a study, at which best value: the same study with and without, every trial a launched run.

    python -m benchmarks.pruning [--workers 2] [--seeds 3] [--orders 200]

A seed is a study's: rows, start, sampler. Halving by 2 and by 3 are run; all pruners read the unpruned curves again in
other orders, which is exact: a pruned trial is the beginning of the whole one. Writes benchmarks/results/pruning.json.
"""

import argparse
import json
import os
import random
import statistics
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

import sweeps
from benchmarks import quality
from herd.run import config
from herd.run.files import write_atomic
from sweeps import settings, storages
from sweeps.settings import Pruner, Study

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pruning.json"
STUDY = ROOT / "benchmarks" / "pruning.yaml"
FACTORS = (2, 3)  # of halving, in studies that are run
PRUNERS = (
    Pruner(kind="halving", factor=2),
    Pruner(kind="halving", factor=3),
    Pruner(kind="hyperband", factor=3),
    Pruner(kind="median"),
)
TEACHER = (
    "run.steps=400", "run.checkpoint_every=400", "run.evaluate_every=400",
    "data.sequence_length=128", "data.heldout_rows=64", "tokenizer.vocab_size=1024", "batch.rows=4",
    "students.behemoth.overrides="
    "{hidden_size: 128, intermediate_size: 128, intermediate_size_mlp: 256, num_local_experts: 4}",
)  # fmt: skip
SPREAD = 100  # between the seeds of studies, so that none repeats with another's fresh ones
Curve = dict[int, float]


def curves(study: Study) -> list[FrozenTrial]:
    """The trials of a study that is over, in the order they were asked for."""
    found = optuna.load_study(study_name=study.name, storage=storages.open_storage(study.storage_url))
    return [trial for trial in found.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def replay(study: Study, pruner: Pruner, order: list[Curve]) -> tuple[list[int], float]:
    """Steps each trial makes and the best value of those that end, when trials with these curves run in this order."""
    base = config.load(study.base, study.set)
    made = optuna.create_study(pruner=storages.make_pruner(study.model_copy(update={"pruner": pruner}), base))
    trained = []
    for curve in order:
        trial = made.ask()
        for step, value in curve.items():
            trial.report(value, step)
            if step < max(curve) and trial.should_prune():
                made.tell(trial, state=TrialState.PRUNED)
                break
        else:
            made.tell(trial, value)
        trained.append(step)
    return trained, made.best_value


def in_other_orders(study: Study, orders: int) -> list[dict[str, object]]:
    """Every pruner on the curves of an unpruned study, the defaults first and the others shuffled."""
    whole = curves(study)
    first, *others = [trial.intermediate_values for trial in whole]
    unpruned = sum(max(curve) for curve in (first, *others))
    best = min(trial.value for trial in whole)
    rows = []
    for pruner in PRUNERS:
        savings, losses = [], []
        for number in range(orders):
            shuffled = random.Random(number).sample(others, len(others))
            trained, value = replay(study, pruner, [first, *shuffled])
            savings.append(unpruned / sum(trained))
            losses.append(value - best)
        rows.append({
            "pruner": pruner.kind, "factor": pruner.factor, "orders": orders,
            "saving_median": statistics.median(savings), "saving_deciles": statistics.quantiles(savings, n=10),
            "same_best": sum(loss == 0 for loss in losses) / orders, "loss_mean": statistics.fmean(losses),
            "loss_worst": max(losses),
        })  # fmt: skip
    return rows


def summary(study: Study) -> dict[str, object]:
    """What a study that is over has cost and found."""
    trials = curves(study)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = min(complete, key=lambda trial: trial.value)
    return {
        "trials": len(trials), "complete": len(complete), "best": best.value, "best_number": best.number,
        "best_params": best.params, "defaults": complete[0].value,
        "steps": sum(trial.last_step for trial in trials),
    }  # fmt: skip


def compare(seed: int, workers: int, orders: int) -> dict[str, object]:
    """One seed's study without pruning and with it; the repeats of the latter say what their best is worth."""
    own = [f"seed={SPREAD * seed}", f"sampler.seed={seed}"]
    whole = settings.load(STUDY, [*own, f"name=pruning-{seed}-unpruned", "pruner={kind: none}", "repeats.seeds=0"])
    sweeps.run(whole, workers=workers)
    found = {"seed": seed, "unpruned": summary(whole), "pruned": {}, "replays": in_other_orders(whole, orders)}
    for factor in FACTORS:
        pruned = settings.load(STUDY, [*own, f"name=pruning-{seed}-by-{factor}", f"pruner.factor={factor}"])
        repeats = sweeps.run(pruned, workers=workers).repeats
        one = found["pruned"][f"halving by {factor}"] = summary(pruned) | {"repeats": repeats}
        one["saving"] = found["unpruned"]["steps"] / one["steps"]
    return found


def show(found: dict[str, object]) -> None:
    """One seed's comparison, in words."""
    for name, one in {"unpruned": found["unpruned"], **found["pruned"]}.items():
        ended = f"{one['complete']} of {one['trials']} trials to the end"
        saving = f", {one['saving']:.2f}x" if "saving" in one else ""
        print(f"seed {found['seed']}  {name:12} {one['steps']:6} steps{saving}  best {one['best']:.4f}  {ended}")
    for row in found["replays"]:
        low, *_, high = row["saving_deciles"]
        print(f"{row['pruner']:9} factor {row['factor']}: {row['saving_median']:.2f}x, deciles {low:.2f} - {high:.2f}")
        print(f"          the same best in {row['same_best']:.0%} of orders, {row['loss_mean']:+.4f} nats on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="trials at one time")
    parser.add_argument("--seeds", type=int, default=3, help="of the study, from 0 on")
    parser.add_argument("--orders", type=int, default=200, help="of the replays")
    options = parser.parse_args()
    os.chdir(ROOT)
    storages.quiet()
    quality.RUNS.mkdir(parents=True, exist_ok=True)
    quality.distill("configs/experiments/teacher.yaml", "pruning-teacher", TEACHER)
    found = []
    for seed in range(options.seeds):
        found.append(compare(seed, options.workers, options.orders))
        write_atomic(RESULTS, json.dumps(found, indent=1) + "\n")
        show(found[-1])
    unpruned = sum(one["unpruned"]["steps"] for one in found)
    for name in found[0]["pruned"]:
        saving = unpruned / sum(one["pruned"][name]["steps"] for one in found)
        worse = statistics.fmean(one["pruned"][name]["best"] - one["unpruned"]["best"] for one in found)
        print(f"{name}, all seeds: {saving:.2f}x, best value {worse:+.4f} nats")


if __name__ == "__main__":
    main()
