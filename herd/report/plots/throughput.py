"""Tokens per second over the run, and the parts a step's time goes to.

figure = draw(record, WIDE)
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from herd.report.formats import duration
from herd.report.plots.losses import window
from herd.report.record import Record
from herd.report.style import FAINT, MUTED, Size, colours, new_figure, settle, smooth, styled


def step_seconds(record: Record) -> float | None:
    """Median wall seconds of a step, from the clock between logged steps (evaluations and saves fall out)."""
    elapsed = record.column("elapsed_s")
    if len(elapsed.step_S) < 2:
        return None
    return float(np.nanmedian(np.diff(elapsed.value_S) / np.diff(elapsed.step_S)))


def parts(record: Record) -> list[tuple[str, float]]:
    """(part, median seconds a step) as logged under time/, and the rest of the step's wall time."""
    timed = []
    for key in record.keys:
        if key.startswith("time/") and key.endswith("_s"):
            timed.append(
                (key.removeprefix("time/").removesuffix("_s"), float(np.nanmedian(record.column(key).value_S)))
            )
    whole = step_seconds(record)
    if timed and whole is not None and (rest := whole - sum(seconds for _, seconds in timed)) > 0:
        timed.append(("everything else", rest))
    return timed


def draw(record: Record, size: Size) -> Figure | None:
    speed = record.column("tokens_per_s")
    timed = parts(record)
    if not len(speed.step_S) and not timed:
        return None
    panels = bool(len(speed.step_S)) + bool(timed)
    with styled(size):
        shape = (1, panels) if size.name == "wide" else (panels, 1)
        figure = new_figure(size, 2.9 if size.name == "wide" else 2.6 * panels)
        grid = list(figure.subplots(*shape, squeeze=False).flat)
        if len(speed.step_S):
            _draw_speed(grid.pop(0), record)
        if timed:
            _draw_parts(grid.pop(0), timed, colours(record.models))
        return settle(figure)


def _draw_speed(axes: Axes, record: Record) -> None:
    speed = record.column("tokens_per_s")
    axes.plot(speed.step_S, speed.value_S, color=FAINT, linewidth=0.8)
    axes.plot(speed.step_S, smooth(speed.value_S, window=window(record)), color=MUTED, linewidth=1.8)
    axes.set(title="Tokens per second", xlabel="step", xlim=(0, record.last_step))
    axes.set_ylim(0, 1.15 * np.nanquantile(speed.value_S, 0.99))
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _draw_parts(axes: Axes, timed: list[tuple[str, float]], palette: dict[str, str]) -> None:
    names = [name for name, _ in timed]
    seconds = np.array([value for _, value in timed])
    bars = axes.barh(names, seconds, color=[palette.get(name, "#c4c9d1") for name in names], height=0.66)
    labels = [f"{duration(value)} · {100 * value / seconds.sum():.0f} %" for value in seconds]
    axes.bar_label(bars, labels, padding=5)
    axes.set(title="A step's time", xlim=(0, 1.55 * seconds.max()), xticks=[])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(axis="y", labelcolor="#24292f")
