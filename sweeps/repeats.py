"""The best trial and the defaults again with fresh seeds, paired: was it luck?

run(study, optuna_study, slots, stop)           # kept in the study's storage; runs that are done are not run again
"""

import math
import time
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import optuna
from scipy.stats import t as student_t

from herd.run.errors import ENVIRONMENT, ConfigError, Interrupted
from sweeps import metrics, results, tracking
from sweeps.settings import Study
from sweeps.stopping import Stop
from sweeps.trial import Slot, TrialRun, setting_aside
from sweeps.worker import TrialsFail

FIRST_SEED = 1000  # beyond any seed the trials used
CONFIDENCE = 0.95
GLANCE_S = 0.25
Key = tuple[str, int]  # arm, seed


def run(study: Study, optuna_study: optuna.Study, slots: list[Slot], stop: Stop, beat: Callable[[], None]) -> None:
    """Run what is missing and store the paired values of the first objective, with the interval of their difference.

    A seed whose run fails is left out, with a line. Raises TrialsFail when the machine is at fault, Interrupted when
    asked to stop; both leave nothing running. `beat` is called all the while.
    """
    best = results.read(study, optuna_study).best
    if best is None:
        return
    arms = {"best": list(best.overrides)} | ({} if best.defaults else {"defaults": []})
    names = {"best": f"best-{best.number:04d}", "defaults": "defaults"}  # these serve the next best too
    seeds = [study.seed + FIRST_SEED + index for index in range(study.repeats.seeds)]
    runs = {
        (arm, seed): TrialRun.of(study, name=f"repeat-{names[arm]}-seed-{seed}", overrides=arms[arm], seed=seed)
        for seed, arm in product(seeds, arms)
    }
    facts = {"sweep.study": study.name}
    tags = {arm: tracking.run_tags(optuna_study, facts | {"sweep.repeat": arm}) for arm in arms}
    metric = study.objectives[0].metric
    run_missing(runs, metric, slots, stop, beat, tags)
    values = {arm: [_value(runs[arm, seed], metric) for seed in seeds] for arm in arms}
    optuna_study.set_user_attr(
        results.REPEATS, {"trial": best.number, "seeds": seeds, "metric": metric, **paired(values)}
    )


def run_missing(
    runs: dict[Key, TrialRun],
    metric: str,
    slots: list[Slot],
    stop: Stop,
    beat: Callable[[], None],
    tags: Mapping[str, list[str]],
) -> None:
    """Run those that have not ended well before, as many at a time as there are slots."""
    waiting = [key for key, one in runs.items() if not one.is_done()]
    if waiting:
        print(f"{len(waiting)} of {len(runs)} repeats with fresh seeds are still to run", flush=True)
    running: dict[int, tuple[TrialRun, float]] = {}  # by slot, with when it must have ended
    try:
        while waiting or running:
            for slot in slots:
                if slot.number not in running and waiting:
                    arm, seed = waiting.pop(0)
                    one = runs[arm, seed]
                    one.start(slot, tags[arm])
                    running[slot.number] = one, time.monotonic() + 60 * (one.study.budget.trial_minutes or math.inf)
            for number, (one, until) in list(running.items()):
                if one.code() is not None:
                    del running[number]
                    _take(one, metric)
                elif time.monotonic() > until:
                    del running[number]
                    one.stop()
                    print(f"{one.folder.name} takes longer than budget.trial_minutes and is left out", flush=True)
            if stop.asked:
                raise Interrupted("")
            beat()
            time.sleep(GLANCE_S)
    finally:
        for one, _ in running.values():
            one.stop()


def _take(ended: TrialRun, metric: str) -> None:
    code, name = ended.code(), ended.folder.name
    if code == 0:
        try:
            with setting_aside(ended):
                metrics.final(ended.folder, metric)
        except ConfigError as error:
            print(f"{name} is left out: {error}", flush=True)
        else:
            ended.finish()
            print(f"{name} has ended", flush=True)
    elif code == ENVIRONMENT:
        raise TrialsFail(f"{name}: {ended.last_words()} (its log: {ended.log})", ENVIRONMENT)
    else:
        print(f"{name} failed and is left out: {ended.last_words()} (its log: {ended.log})", flush=True)


def _value(ended: TrialRun, metric: str) -> float | None:
    value = metrics.final(ended.folder, metric) if ended.is_done() else math.nan
    return value if metrics.usable(value) else None


def paired(values: dict[str, list[float | None]]) -> dict[str, Any]:
    """Values by arm, and best - defaults over the seeds that have both: mean with its 95 % t interval (None from fewer
    than two)."""
    outcome: dict[str, Any] = {"values": values}
    pairs = zip(values["best"], values.get("defaults", []), strict=False)
    differences = [best - default for best, default in pairs if best is not None and default is not None]
    count = len(differences)
    if not count:
        return outcome
    mean = sum(differences) / count
    outcome |= {"pairs": count, "difference": mean, "interval": None}
    if count > 1:
        spread = (sum((value - mean) ** 2 for value in differences) / (count - 1) / count) ** 0.5
        half = float(student_t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * spread
        outcome["interval"] = [mean - half, mean + half]
    return outcome
