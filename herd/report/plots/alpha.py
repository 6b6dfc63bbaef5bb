"""Weight of the soft target (alpha): spread over tokens as a heat map, mean, by teacher entropy, and the gap behind it.

    figure = draw(record, WIDE)

Legend: S logged steps, K bins of alpha over [0, 1], B bins of teacher entropy, P pixels over time.
"""

from collections.abc import Iterable

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from herd.report.plots.losses import window
from herd.report.record import Record
from herd.report.style import INK, MUTED, Size, colours, label_ends, new_figure, settle, shades, smooth, styled

_PIXELS = 160
_TOLD_APART = 0.01


def draw(record: Record, size: Size) -> Figure | None:
    students = [name for name in record.students if len(record.column(f"student/{name}/alpha").step_S)]
    if not students:
        return None
    palette = colours(record.models)
    panels = {_draw_alpha: 2.4}
    if any(_by_entropy(record, name) is not None for name in students):
        panels[_draw_by_entropy] = 1.25
    with_gap = any(len(record.column(f"student/{name}/gap").step_S) for name in students)
    if with_gap:
        panels[_draw_gap] = 1.25
    across = 1 if size.name == "narrow" else len(students) if len(students) <= 3 else 2
    blocks = -(-len(students) // across)
    heights = list(panels.values())
    with styled(size):
        figure = new_figure(size, blocks * (sum(heights) + 0.75))
        grid = figure.subplots(
            blocks * len(heights), across, sharex=True, squeeze=False, height_ratios=heights * blocks
        )
        for i, name in enumerate(students):
            block, column = divmod(i, across)
            for row, draw_panel in enumerate(panels):
                draw_panel(grid[block * len(heights) + row, column], record, name, palette[name])
        if with_gap:
            _share_limits(grid[len(heights) - 1 :: len(heights)].flat)
        for axes in grid[-1]:
            axes.set_xlabel("step")
        grid[0, 0].set_xlim(0, record.last_step)
        return settle(figure)


def _draw_alpha(axes: Axes, record: Record, name: str, colour: str) -> None:
    step_S, histograms = record.arrays(f"student/{name}/alpha_histogram")
    if histograms:
        image_KP = over_time(np.stack(histograms), pixels=_PIXELS)
        extent = (step_S[0] - 0.5, step_S[-1] + 0.5, 0.0, 1.0)
        axes.imshow(
            image_KP, extent=extent, origin="lower", aspect="auto", cmap=shades(colour), norm=PowerNorm(0.5, 0.0, 1.0)
        )
    mean = record.column(f"student/{name}/alpha")
    halo = [patheffects.withStroke(linewidth=4, foreground="white")]
    axes.plot(mean.step_S, smooth(mean.value_S, window=window(record)), color=INK, linewidth=1.6, path_effects=halo)
    axes.set_title(f"{name}: soft-target weight", color=colour)
    axes.set(ylabel="alpha", ylim=(0, 1), yticks=[0, 0.5, 1])
    axes.grid(visible=False)
    known_S = mean.value_S[np.isfinite(mean.value_S)]
    if len(known_S):
        end = known_S[-max(1, len(known_S) // 20) :].mean()
        label_ends(axes, [(end, f"{end:.2f}", INK)])


def _by_entropy(record: Record, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """(steps [S], mean alpha by entropy bin [S, B]); None where no design told bins apart."""
    step_S, rows = record.arrays(f"student/{name}/alpha_by_entropy")
    if not rows:
        return None
    alpha_SB = np.stack([row.astype(np.float64) for row in rows])  # None, a bin without tokens, becomes NaN
    differs = np.nanmax(alpha_SB, axis=1) - np.nanmin(alpha_SB, axis=1) > _TOLD_APART
    return (step_S, alpha_SB) if differs.any() else None


def _draw_by_entropy(axes: Axes, record: Record, name: str, colour: str) -> None:
    axes.set_title("by teacher entropy, low to high", fontweight="normal", color=MUTED, fontsize="medium")
    axes.set_yticks([])
    axes.grid(visible=False)
    known = _by_entropy(record, name)
    if known is None:
        return
    step_S, alpha_SB = known
    extent = (step_S[0] - 0.5, step_S[-1] + 0.5, 0.0, alpha_SB.shape[1])
    axes.imshow(alpha_SB.T, extent=extent, origin="lower", aspect="auto", cmap=shades(colour), vmin=0.0, vmax=1.0)


def _draw_gap(axes: Axes, record: Record, name: str, colour: str) -> None:
    gap = record.column(f"student/{name}/gap")
    value_S = smooth(gap.value_S, window=window(record))
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.plot(gap.step_S, value_S, color=colour, linewidth=1.6)
    axes.set_title("teacher's lead, nats", fontweight="normal", color=MUTED, fontsize="medium")


def _share_limits(panels: Iterable[Axes]) -> None:
    """One scale for all students, so that the gaps can be compared."""
    panels = list(panels)
    limits = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def over_time(histogram_SK: NDArray[np.float64], *, pixels: int) -> NDArray[np.float64]:
    """[K, P] mean histograms of successive stretches of time, at most `pixels` of them."""
    parts = np.array_split(histogram_SK, min(pixels, len(histogram_SK)))
    return np.stack([part.mean(axis=0) for part in parts], axis=1)
