"""How every plot looks: one colour per model everywhere, two sizes (page and phone), little ink.

with sheet(WIDE, rows=1) as (figure, axes): ...
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from numpy.typing import NDArray

INK = "#24292f"
MUTED = "#6b7280"
FAINT = "#e5e7eb"
DPI = 200
_END_LABEL = "end label"

# Okabe & Ito's colour-blind safe set without its yellow (unreadable on white); the teacher is dark grey.
_TEACHER = "#4a4a4a"
_STUDENTS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Size:
    """A page width: inches across and the font that reads well there."""

    name: str
    width: float
    font: float


WIDE = Size("wide", 8.4, 10.5)
NARROW = Size("narrow", 4.2, 9.5)


def colours(models: Sequence[str]) -> dict[str, str]:
    """Model -> colour. The order of the models decides, so it is the same in every plot of a run."""
    students = [model for model in models if model != "teacher"]
    return {"teacher": _TEACHER} | {name: _STUDENTS[i % len(_STUDENTS)] for i, name in enumerate(students)}


def shades(colour: str) -> LinearSegmentedColormap:
    """White to a model's colour, for heat maps about that model."""
    return LinearSegmentedColormap.from_list("shades", ["#ffffff", colour])


@contextmanager
def styled(size: Size) -> Iterator[None]:
    """Matplotlib settings of the report, for the duration of one figure."""
    settings = {
        "font.size": size.font,
        "axes.titlesize": size.font + 1,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 9,
        "axes.titlecolor": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": "#9ca3af",
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": FAINT,
        "grid.linewidth": 0.8,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "text.color": INK,
        "lines.solid_capstyle": "round",
        "figure.facecolor": "white",
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(size: Size, height: float) -> Figure:
    """An empty figure that draws without a display; lay out with constrained layout."""
    figure = Figure(figsize=(size.width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def smooth(value_S: NDArray[np.float64], *, window: int) -> NDArray[np.float64]:
    """Running mean over the last `window` entries (fewer at the start), blind to NaN."""
    known_S = np.isfinite(value_S)
    total_S = np.cumsum(np.where(known_S, value_S, 0.0))
    count_S = np.cumsum(known_S)
    total_S[window:] -= total_S[:-window].copy()
    count_S = count_S.astype(np.float64)
    count_S[window:] -= count_S[:-window].copy()
    return np.divide(total_S, count_S, out=np.full(len(value_S), np.nan), where=count_S > 0)


def label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Name lines at the right edge, in their colour, instead of a legend: (y in data units, text, colour).

    `settle` moves those that would overlap.
    """
    for y, text, colour in labels:
        axes.annotate(
            text,
            (1.0, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            gid=_END_LABEL,
        )


def settle(figure: Figure) -> Figure:
    """Lay the figure out, once and for all, and push the labels at line ends apart. Returns the figure."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        labels = [text for text in axes.texts if text.get_gid() == _END_LABEL]
        if labels:
            _push_apart(axes, labels)
    return figure


def _push_apart(axes: Axes, labels: list[Annotation]) -> None:
    low, high = axes.get_ylim()
    room = 1.25 * labels[0].get_window_extent().height / axes.get_window_extent().height
    ordered = sorted(labels, key=lambda label: label.xy[1])
    places = spread_apart([(label.xy[1] - low) / (high - low) for label in ordered], room)
    for label, place in zip(ordered, places, strict=True):
        label.xy, label.xycoords = (1.0, place), "axes fraction"


def spread_apart(places: Sequence[float], room: float) -> list[float]:
    """Increasing positions in [0, 1], moved as little as needed (least squares) to lie at least `room` apart."""
    # Pool adjacent violators on positions less their forced offsets: the exact solution of this isotonic problem,
    # and clipping it solves the one with bounds.
    blocks: list[list[float]] = []  # [mean, count]
    for i, place in enumerate(places):
        blocks.append([place - i * room, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, count = blocks.pop()
            below, weight = blocks[-1]
            blocks[-1] = [(below * weight + mean * count) / (weight + count), weight + count]
    level = [mean for mean, count in blocks for _ in range(int(count))]
    most = max(0.0, 1.0 - (len(places) - 1) * room)
    return [min(max(mean, 0.0), most) + i * room for i, mean in enumerate(level)]
