"""KL against size, for all bytes and for those a token reads: trials, their front, uniform schemes, what was predicted.

write(path, panels)                   # a PNG, atomically
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from herd.report.style import MUTED, WIDE, new_figure, settle, styled
from herd.run.files import write_atomic

FRONT, OTHER, PREDICTED, UNIFORM = "#0072b2", "#9ca3af", "#e69f00", "#d55e00"
Place = tuple[float, float]
"""Bits a weight, nats a token."""


@dataclass(frozen=True)
class Panel:
    title: str
    trials: Sequence[Place]
    front: Sequence[Place]
    uniform: dict[str, Place]
    predicted: Sequence[Place]
    """The dynamic programme's front, as its sums foretell it."""
    budget: float | None


def write(path: Path, panels: Sequence[Panel]) -> None:
    """Draw one panel below the other."""
    with styled(WIDE):
        figure = new_figure(WIDE, 3.6 * len(panels))
        for number, panel in enumerate(panels, start=1):
            _fill(figure.add_subplot(len(panels), 1, number), panel)
        settle(figure)
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, image.getvalue())


def _fill(axes: Axes, panel: Panel) -> None:
    shown = [place for place in panel.trials if place[1] > 0]  # all in bf16 loses nothing, which has no logarithm
    axes.plot(*_columns(shown), "o", color=OTHER, markersize=3.5, label="measured")
    axes.plot(*_columns(panel.predicted), "--", color=PREDICTED, linewidth=1.3, label="dynamic programme, foretold")
    axes.plot(*_columns(panel.front), "o-", color=FRONT, markersize=4.5, linewidth=1.3, label="measured front")
    places = [place for place in panel.uniform.values() if place[1] > 0]
    axes.plot(*_columns(places), "D", color=UNIFORM, markersize=6, label="one scheme for all")
    for name, place in panel.uniform.items():
        if place[1] > 0:
            axes.annotate(name, place, xytext=(6, 5), textcoords="offset points", color=UNIFORM)
    if panel.budget is not None:
        axes.axvline(panel.budget, color=MUTED, linewidth=0.8, linestyle=":")
        axes.annotate("budget", (panel.budget, 1.0), xycoords=("data", "axes fraction"), color=MUTED, va="top")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(_ticks())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(title=panel.title, xlabel="bits a weight", ylabel="KL, nats a token")
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def _ticks() -> object:
    from matplotlib.ticker import FixedLocator

    return FixedLocator([3, 4, 4.5, 5, 6, 7, 8, 10, 12, 16])


def _columns(places: Sequence[Place]) -> tuple[list[float], list[float]]:
    ordered = [place for place in places if place[1] > 0]
    return [place[0] for place in ordered], [place[1] for place in ordered]
