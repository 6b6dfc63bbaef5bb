"""Pictures of a transfer check: loss over the rate at every size, how the best rate moves, sizes of activations.

for name, (heading, caption, figure) in draw(curves, findings, coordinates, WIDE).items(): ...
"""

import math
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from herd.report.style import MUTED, Size, label_ends, new_figure, settle, styled
from sweeps.transfer.fits import Flatness, GridFinding
from sweeps.transfer.grids import Curve
from sweeps.transfer.settings import GRID_STEP, Along

Drawn = tuple[str, str, Figure]
RULED, STANDARD = "#0072b2", "#d55e00"
NAMES = {True: "our rules", False: "standard"}
SIZE_OF = {"width": "width", "depth": "depth", "batch": "batch, the same tokens", "tokens": "tokens"}
ROOM_ABOVE = 0.2
"""Share of the lowest loss that is shown above it: rates far off say nothing."""


def draw(
    curves: Sequence[Curve], findings: Sequence[GridFinding], coordinates: Sequence[Flatness], size: Size
) -> dict[str, Drawn]:
    """Name -> heading, caption, figure."""
    pictures = {}
    for along in dict.fromkeys(finding.along for finding in findings):
        pictures[f"rates-{along}"] = (
            f"Loss over the learning rate, by {SIZE_OF[along]}",
            "Mean held-out nats over the seeds; the rate is the base's, before the rules. Dots: the best on the grid. "
            "Dashed: the base's best.",
            _rates(along, curves, findings, size),
        )
    if findings:
        pictures["moves"] = (
            "How the best rate moves",
            "Fitted best rate against the base's, in grid steps of 2^0.5; points are seeds. Grey: one step either way.",
            _moves(findings, size),
        )
    if coordinates:
        pictures["coordinates"] = (
            "Sizes of activations",
            "Log2 of mean |x| after the last step, less the base's, by kind of module. Grey: within a factor of two.",
            _coordinates(coordinates, size),
        )
    return pictures


def _rates(along: Along, curves: Sequence[Curve], findings: Sequence[GridFinding], size: Size) -> Figure:
    panels = [finding for finding in findings if finding.along == along]
    across = len(panels) if size.name == "wide" else 1
    down = math.ceil(len(panels) / across)
    with styled(size):
        figure = new_figure(size, 3.1 * down)
        for place, finding in enumerate(panels, start=1):
            axes = figure.add_subplot(down, across, place)
            mine = [curve for curve in curves if (curve.along, curve.ruled) == (along, finding.ruled)]
            lowest = min(curve.mean(curve.best) for curve in mine)
            for index, curve in enumerate(mine):
                colour = colormaps["viridis"](0.85 * index / max(1, len(mine) - 1))
                rungs = [rung for rung in sorted(curve.losses) if math.isfinite(curve.mean(rung))]
                axes.plot(
                    [rung * GRID_STEP for rung in rungs],
                    [curve.mean(rung) for rung in rungs],
                    color=colour,
                    linewidth=1.8,
                    label=f"x{curve.factor}",
                )
                axes.plot(curve.best * GRID_STEP, curve.mean(curve.best), "o", color=colour, markersize=6)
            axes.axvline(mine[0].best * GRID_STEP, color=MUTED, linewidth=1, linestyle="--")
            worst = max(curve.mean(curve.best) for curve in mine)
            axes.set_ylim(lowest * 0.99, worst * (1 + ROOM_ABOVE))
            axes.set(title=f"{along}: {NAMES[finding.ruled]}", xlabel="log2 of the base's rate")
            axes.legend(frameon=False)
        settle(figure)
    return figure


def _moves(findings: Sequence[GridFinding], size: Size) -> Figure:
    along = list(dict.fromkeys(finding.along for finding in findings))
    across = len(along) if size.name == "wide" else 2
    down = math.ceil(len(along) / across)
    with styled(size):
        figure = new_figure(size, 2.7 * down)
        for place, direction in enumerate(along, start=1):
            axes = figure.add_subplot(down, across, place)
            axes.axhspan(-1, 1, color="#e5e7eb", linewidth=0)
            for finding in findings:
                if finding.along == direction:
                    _move(axes, finding)
            axes.set(title=direction, xlabel="log2 of the factor")
        settle(figure)
    return figure


def _move(axes: Axes, finding: GridFinding) -> None:
    colour = RULED if finding.ruled else STANDARD
    base = finding.sizes[0]
    places = [math.log2(size.factor) for size in finding.sizes]
    steps = [math.log2(size.fitted / base.fitted) / GRID_STEP for size in finding.sizes]
    axes.plot(places, steps, "o-", color=colour, linewidth=1.8, markersize=5)
    for size, place in zip(finding.sizes, places, strict=True):
        seeds = zip(size.by_seed, base.by_seed, strict=True)
        shifts = [math.log2(here / there) / GRID_STEP for here, there in seeds]
        axes.plot([place] * len(shifts), shifts, ".", color=colour, alpha=0.45, markersize=4)
    label_ends(axes, [(steps[-1], "rules" if finding.ruled else "standard", colour)])


def _coordinates(coordinates: Sequence[Flatness], size: Size) -> Figure:
    panels = list(dict.fromkeys((flat.along, flat.ruled) for flat in coordinates))
    kinds = list(dict.fromkeys(flat.kind for flat in coordinates))
    palette = colormaps["tab10"]
    across = 2 if size.name == "wide" else 1
    down = math.ceil(len(panels) / across)
    with styled(size):
        figure = new_figure(size, 2.9 * down)
        for place, (along, ruled) in enumerate(panels, start=1):
            axes = figure.add_subplot(down, across, place)
            axes.axhspan(-1, 1, color="#e5e7eb", linewidth=0)
            for flat in coordinates:
                if (flat.along, flat.ruled) == (along, ruled):
                    base = flat.means[min(flat.means)]
                    axes.plot(
                        [math.log2(factor) for factor in flat.means],
                        [math.log2(mean / base) for mean in flat.means.values()],
                        "o-",
                        color=palette(kinds.index(flat.kind) % 10),
                        markersize=3,
                        label=flat.kind,
                    )
            axes.set(title=f"{along}: {NAMES[ruled]}", xlabel="log2 of the factor")
            if place == 1:
                axes.legend(frameon=False, fontsize=7, ncols=2)
        settle(figure)
    return figure
