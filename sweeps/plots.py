"""Pictures of a study: the search, curves within trials, each setting against the value, what mattered, trade-offs.

for name, (heading, caption, figure) in draw(study, optuna_study, result, WIDE).items(): ...
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from optuna.distributions import CategoricalDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from herd.report.style import MUTED, Size, new_figure, settle, styled
from sweeps.ledger import Ledger
from sweeps.ranges import Range
from sweeps.results import Result
from sweeps.settings import Study

BEST, OTHER, PRUNED = "#0072b2", "#9ca3af", "#e69f00"
FEWEST_FOR_IMPORTANCE = 8
MOST_SETTINGS = 9
Drawn = tuple[str, str, Figure]


def draw(study: Study, optuna_study: optuna.Study, result: Result, size: Size) -> dict[str, Drawn]:
    """Name -> heading, caption and figure, for the pictures this study has data for."""
    trials = Ledger(optuna_study, study.trials).ended()
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    pictures: dict[str, Drawn | None] = {}
    if len(study.objectives) == 1:
        pictures["history"] = history(study, complete, size)
        pictures["curves"] = curves(study, trials, result, size)
        pictures["importance"] = importance(optuna_study, complete, size)
    elif len(study.objectives) == 2:
        pictures["trade"] = trade(study, complete, result, size)
    pictures["slices"] = slices(study, complete, result, size)
    return {name: picture for name, picture in pictures.items() if picture is not None}


def history(study: Study, complete: list[FrozenTrial], size: Size) -> Drawn | None:
    """Values in the order of the trials, and the best so far."""
    if not complete:
        return None
    sign = 1 if study.objectives[0].direction == "minimize" else -1
    values = np.array([trial.value for trial in complete])
    best = sign * np.minimum.accumulate(sign * values)
    numbers = [trial.number for trial in complete]

    def fill(axes: Axes) -> None:
        axes.plot(numbers, values, "o", color=OTHER, markersize=4)
        axes.step(numbers, best, where="post", color=BEST, linewidth=2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title=study.objectives[0].metric, xlabel="trial")

    return "The search", "Points: complete trials. Line: the best so far.", _single(fill, size)


def curves(study: Study, trials: list[FrozenTrial], result: Result, size: Size) -> Drawn | None:
    """What trials reported while they ran; pruned ones end early."""
    shown = [trial for trial in trials if len(trial.intermediate_values) > 1]
    if not shown:
        return None
    best = result.best.number if result.best else None

    def fill(axes: Axes) -> None:
        for trial in shown:
            steps = sorted(trial.intermediate_values)
            mine, pruned = trial.number == best, trial.state == TrialState.PRUNED
            axes.plot(
                steps,
                [trial.intermediate_values[step] for step in steps],
                color=BEST if mine else PRUNED if pruned else OTHER,
                linewidth=2.2 if mine else 1.0,
                zorder=3 if mine else 2,
                marker="x" if pruned else None,
                markevery=[-1] if pruned else None,
            )
        axes.set(title=study.objectives[0].metric, xlabel="step" if study.seeds == 1 else "seed")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _robust_limits(axes, [value for trial in shown for value in trial.intermediate_values.values()])

    return "Within trials", "Blue: the best. Orange, ending in a cross: pruned.", _single(fill, size)


def importance(optuna_study: optuna.Study, complete: list[FrozenTrial], size: Size) -> Drawn | None:
    """Share of the values' variance that each setting explains (fANOVA, Hutter et al. 2014)."""
    varied = complete and len({trial.value for trial in complete}) > 1
    if len(complete) < FEWEST_FOR_IMPORTANCE or not varied or len(complete[0].params) < 2:
        return None
    shares = get_param_importances(optuna_study, evaluator=FanovaImportanceEvaluator(seed=0))
    names = list(shares)[:MOST_SETTINGS][::-1]

    def fill(axes: Axes) -> None:
        axes.barh(range(len(names)), [shares[name] for name in names], color=BEST, height=0.55)
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="x")
        axes.set(title="Share of variance explained", xlim=(0, 1))

    return "What mattered", "fANOVA over the complete trials; few trials make it rough.", _single(fill, size, 0.3)


def trade(study: Study, complete: list[FrozenTrial], result: Result, size: Size) -> Drawn | None:
    """Two objectives against one another, and the front."""
    if not complete:
        return None
    first, second = study.objectives
    front = sorted((trial.values for trial in result.front), key=lambda values: values[0])

    def fill(axes: Axes) -> None:
        axes.plot(*zip(*(trial.values for trial in complete), strict=True), "o", color=OTHER, markersize=4)
        axes.plot(*zip(*front, strict=True), "o-", color=BEST, markersize=6, linewidth=1.2)
        for trial in result.front:
            axes.annotate(str(trial.number), trial.values, xytext=(5, 4), textcoords="offset points", color=BEST)
        axes.set(title=second.metric, xlabel=first.metric)

    return "The trade", "Blue: trials that no other beats in both. The numbers are theirs.", _single(fill, size)


def slices(study: Study, complete: list[FrozenTrial], result: Result, size: Size) -> Drawn | None:
    """Each setting against the first objective."""
    paths = list(study.space)[:MOST_SETTINGS]
    if len(complete) < 2:
        return None
    columns = min(len(paths), 3 if size.name == "wide" else 1)
    rows = math.ceil(len(paths) / columns)
    values = [trial.values[0] for trial in complete]
    front = {trial.number for trial in result.front}
    colours = [BEST if trial.number in front else OTHER for trial in complete]
    with styled(size):
        figure = new_figure(size, 2.6 * rows)
        for place, path in enumerate(paths, start=1):
            axes = figure.add_subplot(rows, columns, place)
            _slice(axes, path, study.space[path], complete, values, colours)
            _robust_limits(axes, values)
        settle(figure)
    return "Settings", f"Every complete trial's {study.objectives[0].metric}. Blue: the best.", figure


def _slice(
    axes: Axes, path: str, part: Any, complete: list[FrozenTrial], values: list[float], colours: list[str]
) -> None:
    found = complete[0].distributions[path]
    if isinstance(found, CategoricalDistribution):
        places = [found.choices.index(trial.params[path]) for trial in complete]
        axes.set_xticks(
            range(len(found.choices)), [_short(choice) for choice in found.choices], rotation=20, ha="right"
        )
    else:
        places = [trial.params[path] for trial in complete]
        if isinstance(part, Range) and part.log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
    axes.scatter(places, values, c=colours, s=16)
    axes.set_title(path, fontsize=9)
    axes.tick_params(labelsize=8)


def _single(fill: Callable[[Axes], None], size: Size, ratio: float = 0.45) -> Figure:
    with styled(size):
        figure = new_figure(size, ratio * size.width if size.name == "wide" else 3.2)
        fill(figure.add_subplot())
        settle(figure)
    return figure


def _robust_limits(axes: Axes, values: list[float]) -> None:
    """Leave out what lies far off: one diverged trial would flatten all others. A note says how many."""
    finite = np.array([value for value in values if math.isfinite(value)])
    if len(finite) < 8:
        return
    low, high = np.quantile(finite, [0, 0.9])
    top = high + 0.35 * (high - low)
    outside = int((finite > top).sum())
    if outside and top > low:
        axes.set_ylim(low - 0.05 * (top - low), top)
        axes.text(
            0.99, 0.97, f"{outside} above", transform=axes.transAxes, ha="right", va="top", color=MUTED, fontsize=8
        )


def _short(choice: str) -> str:
    """A choice as the axis shows it: {kind: constant, alpha: 0.5} -> constant, 0.5."""
    bare = ", ".join(part.partition(": ")[2] or part for part in choice.strip("{}").split(", "))
    return bare if len(bare) < 24 else bare[:22] + "…"
