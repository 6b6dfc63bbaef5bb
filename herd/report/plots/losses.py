"""Training loss (running mean) and held-out loss (points) of teacher and students over the steps.

figure = draw(record, WIDE)
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from herd.report.formats import nats
from herd.report.record import Record, Series
from herd.report.style import MUTED, Size, colours, label_ends, new_figure, settle, smooth, styled

_KEY = "points: held out · pale lines: training, running mean"


def window(record: Record) -> int:
    """Logged steps in the running mean: 2.5 % of them."""
    return max(1, round(len(record.steps) / 40))


def training_key(model: str) -> str:
    return "teacher/ce" if model == "teacher" else f"student/{model}/ce"


def draw(record: Record, size: Size) -> Figure | None:
    training = {model: record.column(training_key(model)) for model in record.models}
    heldout = {model: record.column(f"heldout/{model}") for model in record.models}
    if not any(_has_value(series) for series in [*training.values(), *heldout.values()]):
        return None
    smoothed = {m: Series(s.step_S, smooth(s.value_S, window=window(record))) for m, s in training.items()}
    low, high = _limits(smoothed, heldout)
    with styled(size):
        figure = new_figure(size, 0.52 * size.width if size.name == "wide" else 3.6)
        axes = figure.add_subplot()
        axes.set(title="Loss, nats per token", xlabel="step", xlim=(0, record.last_step), ylim=(low, high))
        if size.name == "wide":
            axes.set_title(_KEY, loc="right", color=MUTED, fontsize="medium", fontweight="normal")
        ends = []
        for model, colour in colours(record.models).items():
            if model not in training:
                continue
            _draw_model(axes, smoothed[model], heldout[model], colour, high=high)
            if _has_value(smoothed[model]) or _has_value(heldout[model]):
                ends.append(_end(model, smoothed[model], heldout[model], colour))
        label_ends(axes, ends)
        return settle(figure)


def _draw_model(axes: Axes, smoothed: Series, heldout: Series, colour: str, *, high: float) -> None:
    axes.plot(*smoothed, color=colour, linewidth=1.3, alpha=0.55)
    axes.plot(*heldout, color=colour, linewidth=1.0)
    if len(heldout.step_S) == 1 and not len(smoothed.step_S):  # a frozen teacher, measured once
        axes.axhline(heldout.value_S[0], color=colour, linewidth=1.0, linestyle=(0, (4, 3)))
    # Points may lie on the right edge, where clipping would halve them; those above the plot stay out.
    shown_S = heldout.value_S <= high
    points = heldout.step_S[shown_S], heldout.value_S[shown_S]
    axes.plot(*points, "o", color=colour, markersize=5.5, markeredgecolor="white", clip_on=False, zorder=3)


def _has_value(series: Series) -> bool:
    return bool(np.isfinite(series.value_S).any())


def _end(model: str, smoothed: Series, heldout: Series, colour: str) -> tuple[float, str, str]:
    """Label at the line's end: the last held-out loss where there is one."""
    known_S = heldout.value_S[np.isfinite(heldout.value_S)]
    if len(known_S):
        return known_S[-1], f"{model} {nats(known_S[-1])}", colour
    last = smoothed.value_S[np.isfinite(smoothed.value_S)][-1]
    return last, model, colour


def _limits(smoothed: dict[str, Series], heldout: dict[str, Series]) -> tuple[float, float]:
    """From the lowest value to where the curves stand after 8 % of the steps: the first steps would squash the rest."""
    everything = [series.value_S for series in [*smoothed.values(), *heldout.values()]]
    values = np.concatenate(everything)
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    settled = [series.value_S[int(0.08 * len(series.value_S)) :] for series in smoothed.values()]
    settled += [series.value_S[-1:] for series in heldout.values()]
    late = np.concatenate(settled)
    top = late[np.isfinite(late)].max(initial=-np.inf)
    top = top if np.isfinite(top) else values.max()
    margin = 0.05 * max(top - values.min(), 1e-3)
    return values.min() - margin, top + margin
