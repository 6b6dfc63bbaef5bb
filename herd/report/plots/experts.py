"""How evenly tokens spread over experts: load per layer and expert at the end, evenness and dead experts over time.

    figure = draw(record, WIDE)

Legend: L MoE layers, E experts. A load of 1 is an even share.
"""

from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from herd.report.plots.losses import window
from herd.report.record import Record
from herd.report.style import MUTED, Size, colours, label_ends, new_figure, settle, smooth, styled

# Log-spaced classes around an even share; purple = hungry, orange = crowded (safe for all colour vision).
_BOUNDS = [0.0, 0.18, 0.35, 0.71, 1.41, 2.83, 5.66, 1e9]
_NAMES = ("< ⅙", "¼", "½", "even", "2×", "4×", "> 6×")
_ROW_INCHES = 0.17  # height of a layer's row
_MAP_SHARE = 0.85  # of the figure's width, about, is the map's
_ARM_POINTS = 4.0  # longest half of a cross, across and down


def final_load(record: Record, model: str) -> NDArray[np.float64] | None:
    """[L, E] mean load of the last tenth of the logged steps, as a multiple of an even share."""
    _, loads = record.arrays(f"experts/{model}/load")
    if not loads:
        return None
    share_LE = np.mean(loads[-max(1, len(loads) // 10) :], axis=0)
    return share_LE * share_LE.shape[1]


def draw(record: Record, size: Size) -> Figure | None:
    loads = {model: load for model in record.models if (load := final_load(record, model)) is not None}
    trends = [kind for kind in ("entropy", "dead") if any(len(_trend(record, m, kind)) for m in record.models)]
    if not loads and not trends:
        return None
    palette = colours(record.models)
    with styled(size):
        heights = [0.5 + _ROW_INCHES * len(load_LE) for load_LE in loads.values()]
        below = 0.0 if not trends else 2.0 if size.name == "wide" else 3.6
        figure = new_figure(size, sum(heights) + below + 0.5)
        parts = figure.subfigures(2, 1, height_ratios=[sum(heights) + 0.3, below]) if loads and trends else None
        if loads:
            _draw_loads(parts[0] if parts is not None else figure, loads, heights, palette, size)
        if trends:
            _draw_trends(parts[1] if parts is not None else figure, record, trends, palette, size)
        return settle(figure)


def _draw_loads(
    figure, loads: dict[str, NDArray[np.float64]], heights: list[float], palette: dict[str, str], size: Size
) -> None:
    grid = figure.subplots(len(loads), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (model, load_LE) in zip(grid, loads.items(), strict=True):
        image = _draw_load(axes, model, load_LE, palette[model])
        axes.add_collection(crosses(load_LE, size))
    bar = figure.colorbar(image, ax=list(grid), location="right", shrink=0.9, aspect=22, pad=0.015)
    bar.set_ticks([(low + high) / 2 for low, high in pairwise(_BOUNDS)], labels=_NAMES)
    bar.ax.set_title("load", fontweight="normal", fontsize="medium", color=MUTED, loc="left")
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", length=0)


def _draw_load(axes: Axes, model: str, load_LE: NDArray[np.float64], colour: str):
    layers, experts = load_LE.shape
    image = axes.pcolormesh(
        load_LE,
        cmap="PuOr_r",
        norm=BoundaryNorm(_BOUNDS, 256),
        edgecolors="white",
        linewidth=0.6 if experts <= 32 else 0.15,
    )
    axes.set_title(f"{model}: {experts} experts × {layers} layers", color=colour)
    axes.set(ylabel="layer", xticks=[])
    axes.set_yticks(sorted({0.5, layers - 0.5}), labels=[str(n) for n in sorted({1, layers})])
    axes.invert_yaxis()
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def crosses(load_LE: NDArray[np.float64], size: Size) -> LineCollection:
    """A white cross in the dark cell of every expert without a token; in narrow cells a narrow one, as tall as ever."""
    width = _MAP_SHARE * size.width * 72 / load_LE.shape[1]  # points a cell
    across = min(_ARM_POINTS / width, 0.33)
    down = min(_ARM_POINTS / (_ROW_INCHES * 72), 0.33)
    layer_D, expert_D = np.nonzero(load_LE == 0)
    centre_D12 = np.stack([expert_D + 0.5, layer_D + 0.5], axis=-1)[:, None]
    arms_22 = np.array([[[-across, -down], [across, down]], [[-across, down], [across, -down]]])
    strokes = (centre_D12[:, None] + arms_22).reshape(-1, 2, 2)
    return LineCollection(strokes, colors="white", linewidths=float(np.clip(width / 6, 0.5, 1.4)), capstyle="round")


def _trend(record: Record, model: str, kind: str) -> NDArray[np.float64]:
    return record.column(f"experts/{model}/{kind}").value_S


def _draw_trends(figure, record: Record, trends: list[str], palette: dict[str, str], size: Size) -> None:
    shape = (1, len(trends)) if size.name == "wide" else (len(trends), 1)
    titles = {"entropy": "Load entropy (1 = even)", "dead": "Experts without a token"}
    for axes, kind in zip(figure.subplots(*shape, squeeze=False).flat, trends, strict=True):
        ends = []
        for model in record.models:
            series = record.column(f"experts/{model}/{kind}")
            if not len(series.step_S):
                continue
            value_S = smooth(series.value_S, window=window(record)) if kind == "entropy" else series.value_S
            axes.plot(series.step_S, value_S, color=palette[model], linewidth=1.5)
            last = value_S[-1] if np.isfinite(value_S[-1]) else 0.0
            ends.append((last, f"{model} {last:.2f}" if kind == "entropy" else f"{model} {last:.0f}", palette[model]))
        axes.set(title=titles[kind], xlabel="step", xlim=(0, record.last_step))
        if kind == "dead":
            axes.set_ylim(bottom=0, top=max(1.0, axes.get_ylim()[1]))
            axes.yaxis.get_major_locator().set_params(integer=True)
        label_ends(axes, ends)
