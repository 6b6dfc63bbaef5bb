"""The best trial and the defaults again with fresh seeds, paired: was it luck?

run(study, optuna_study, slots, stop)           # kept in the study's storage; runs that are done are not run again
"""

import time
from itertools import product
from typing import Any

import optuna
from scipy.stats import t as student_t

from herd.run import config_text
from herd.run.errors import Interrupted
from sweeps import metrics, results
from sweeps.settings import Study
from sweeps.stopping import Stop
from sweeps.trial import Slot, TrialRun
from sweeps.worker import Failed, clear_checkpoints

FIRST_SEED = 1000  # beyond any seed the trials used
CONFIDENCE = 0.95
GLANCE_S = 0.25


def run(study: Study, optuna_study: optuna.Study, slots: list[Slot], stop: Stop) -> None:
    """Run what is missing and store the paired values of the first objective, with the interval of their difference.

    Raises Failed when a run fails, Interrupted when asked to stop; both leave nothing running.
    """
    best = results.read(study, optuna_study).best
    if best is None:
        return
    arms = {"best": list(best.overrides)} | ({} if best.defaults else {"defaults": []})
    seeds = [study.seed + FIRST_SEED + index for index in range(study.repeats.seeds)]
    waiting = [(f"repeat-{arm}-{best.number:04d}-seed-{seed}", arm, seed) for seed, arm in product(seeds, arms)]
    names = {(arm, seed): name for name, arm, seed in waiting}
    running: dict[int, TrialRun] = {}
    parent = [f"tracking.parent={run_id}"] if (run_id := optuna_study.user_attrs.get("mlflow_run_id")) else []
    try:
        while waiting or running:
            for slot in slots:
                if slot.number not in running and waiting:
                    name, arm, seed = waiting.pop(0)
                    found = {"sweep.study": study.name, "sweep.repeat": arm}
                    tags = [f"tracking.tags={config_text.write_inline(found)}", *parent]
                    running[slot.number] = TrialRun.start(
                        study, name=name, overrides=arms[arm], seed=seed, slot=slot, tags=tags
                    )
            for number, one in list(running.items()):
                code = one.code()
                if code is not None:
                    del running[number]
                    if code:
                        raise Failed(code, f"{one.folder.name}: {one.last_words()}")
                    clear_checkpoints(one.folder)
            if stop.asked:
                raise Interrupted("")
            time.sleep(GLANCE_S)
    finally:
        for one in running.values():
            one.stop()
    metric = study.objectives[0].metric
    values = {arm: [metrics.final(study.home / names[arm, seed], metric) for seed in seeds] for arm in arms}
    optuna_study.set_user_attr(
        results.REPEATS, {"trial": best.number, "seeds": seeds, "metric": metric, **paired(values)}
    )


def paired(values: dict[str, list[float]]) -> dict[str, Any]:
    """Values by arm, and best - defaults: mean with its 95 % t interval over seeds (None from fewer than two)."""
    outcome: dict[str, Any] = {"values": values}
    if "defaults" not in values:
        return outcome
    differences = [best - default for best, default in zip(values["best"], values["defaults"], strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    outcome |= {"difference": mean, "interval": None}
    if count > 1:
        spread = (sum((value - mean) ** 2 for value in differences) / (count - 1) / count) ** 0.5
        half = float(student_t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * spread
        outcome["interval"] = [mean - half, mean + half]
    return outcome
