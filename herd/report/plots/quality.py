"""Held-out loss against bytes on disk for every artefact, with intervals and the line of best trades.

figure = draw(record, WIDE)
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from herd.report.formats import size as bytes_text
from herd.report.record import Record, model_of, title
from herd.report.style import MUTED, Size, colours, new_figure, settle, styled

_MARKERS = {None: "o", "int4": "s", "fp8": "^", "nf4": "D"}
# Where a label may stand around its point, the best first: (dx, dy) in points, horizontal and vertical alignment.
_SPOTS = (
    (9, 7, "left", "bottom"),
    (-9, 7, "right", "bottom"),
    (9, -7, "left", "top"),
    (-9, -7, "right", "top"),
    (0, 22, "center", "bottom"),
    (0, -22, "center", "top"),
)


def measured(record: Record) -> list[dict[str, Any]]:
    """Entries that have both a size and a held-out loss; controls are learners, not artefacts."""
    known = [e for e in record.entries if e.get("bytes_on_disk") and e.get("heldout_nats") is not None]
    return [entry for entry in known if entry.get("role") != "control"]


def frontier(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Artefacts that nothing else beats in both size and loss, smallest first."""
    best: list[dict[str, Any]] = []
    for entry in sorted(entries, key=lambda e: (e["bytes_on_disk"], e["heldout_nats"])):
        if not best or entry["heldout_nats"] < best[-1]["heldout_nats"]:
            best.append(entry)
    return best


def draw(record: Record, size: Size) -> Figure | None:
    entries = measured(record)
    if not entries:
        return None
    palette = colours(record.models)
    with styled(size):
        figure = new_figure(size, 0.5 * size.width if size.name == "wide" else 3.6)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        line = frontier(entries)
        axes.plot(
            [e["bytes_on_disk"] for e in line],
            [e["heldout_nats"] for e in line],
            color=MUTED,
            linewidth=1.0,
            linestyle=(0, (4, 3)),
            zorder=1,
        )
        for entry in entries:
            _draw_point(axes, entry, palette.get(model_of(entry), MUTED))
        axes.margins(x=0.22, y=0.16)
        axes.text(0.01, 0.03, "↙ better", transform=axes.transAxes, color=MUTED)
        axes.set(title="Held-out loss (nats per token) against size", xlabel="weights on disk")
        _format_sizes(axes)
        settle(figure)
        _place_labels(axes, [(e, palette.get(model_of(e), MUTED)) for e in entries])
    return figure


def _draw_point(axes: Axes, entry: dict[str, Any], colour: str) -> None:
    x, y = entry["bytes_on_disk"], entry["heldout_nats"]
    if entry.get("heldout_ci95"):
        low, high = entry["heldout_ci95"]
        axes.plot([x, x], [low, high], color=colour, linewidth=1.4, alpha=0.45, zorder=2)
    marker = _MARKERS.get(entry.get("scheme"), "P")
    axes.plot(x, y, marker, color=colour, markersize=9, markeredgecolor="white", markeredgewidth=1.0, zorder=3)


def _format_sizes(axes: Axes) -> None:
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)


def _place_labels(axes: Axes, points: list[tuple[dict[str, Any], str]]) -> None:
    """Put every name at the spot around its point that covers least of what is already there."""
    pixels = axes.figure.dpi / 72
    taken = [box for entry, _ in points for box in _covered(axes, entry, pixels=pixels)]
    inside = axes.get_window_extent()
    for entry, colour in points:
        label = axes.annotate(
            title(entry),
            (entry["bytes_on_disk"], entry["heldout_nats"]),
            xytext=(0, 0),
            textcoords="offset points",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )
        costs = []
        for dx, dy, horizontal, vertical in _SPOTS:
            label.set(position=(dx, dy), ha=horizontal, va=vertical)
            box = label.get_window_extent()
            overlap = sum(_overlap(box, other) for other in taken)
            outside = box.width * box.height - _overlap(box, inside)
            costs.append(overlap + 3 * outside)
        dx, dy, horizontal, vertical = _SPOTS[costs.index(min(costs))]
        label.set(position=(dx, dy), ha=horizontal, va=vertical)
        taken.append(label.get_window_extent())


def _covered(axes: Axes, entry: dict[str, Any], *, pixels: float) -> list[Bbox]:
    """Boxes of a point's marker and of its interval's line."""
    size = entry["bytes_on_disk"]
    x, y = axes.transData.transform((size, entry["heldout_nats"]))
    boxes = [Bbox.from_bounds(x - 6 * pixels, y - 6 * pixels, 12 * pixels, 12 * pixels)]
    if entry.get("heldout_ci95"):
        (_, low), (_, high) = (axes.transData.transform((size, bound)) for bound in entry["heldout_ci95"])
        boxes.append(Bbox.from_bounds(x - 3 * pixels, low, 6 * pixels, high - low))
    return boxes


def _overlap(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0)
