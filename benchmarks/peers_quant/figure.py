"""Quality against bits, and against time, one panel of each for every model.

draw(results, Path("docs/img/quantisation.png"))
"""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "ours": "#0b6e4f",
    "llm-compressor": "#c8553d",
    "auto-round": "#3d5a80",
    "bitsandbytes": "#e09f3e",
    "hqq": "#7b2d8b",
    "torchao": "#6c757d",
    "gptqmodel": "#118ab2",
    "Meta": "#222222",
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the figure."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(13, 5.4 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 2, squeeze=False)
    for (left, right), (model, result) in zip(panels, results.items(), strict=True):
        # Eight bits are a matter of their own: an order of magnitude lower.
        rows = [entry for entry in result["table"] if "error" not in entry and entry["bits"] < 6]
        scatter(left, rows, "bits", f"{model}: quality against bits (4-bit formats)", "bits per quantised weight")
        scatter(right, rows, "cpu_seconds", f"{model}: quality against time", "CPU seconds to quantise, one thread")
        right.set_xscale("log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def scatter(axes: Axes, rows: list[dict[str, Any]], key: str, title: str, label: str) -> None:
    """One panel; bars are 95 % intervals over documents."""
    for entry in rows:
        owner = "Meta" if entry["name"].startswith("Meta") else entry["peer"]
        low, high = entry["kl_ci95"]
        spread = [[entry["kl"] - low], [high - entry["kl"]]]
        axes.errorbar(entry[key], entry["kl"], yerr=spread, fmt="o", color=COLOURS[owner], elinewidth=0.7, markersize=5)
    place_labels(axes, rows, key)
    axes.set(title=title, xlabel=label, ylabel="mean KL to bf16, nats a token (lower is better)", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def place_labels(axes: Axes, rows: list[dict[str, Any]], key: str) -> None:
    """Names to the right of the points, moved apart where they would cover each other."""
    top = max(entry["kl_ci95"][1] for entry in rows)
    step = top / 26
    for x in columns(rows, key):
        last = -step
        for entry in sorted((e for e in rows if x[0] <= e[key] <= x[1]), key=lambda e: e["kl"]):
            last = max(entry["kl"], last + step)
            owner = "Meta" if entry["name"].startswith("Meta") else entry["peer"]
            axes.annotate(
                f"  {entry['name']}", (entry[key], entry["kl"]), (x[1], last), fontsize=7, color=COLOURS[owner],
                va="center", ha="left", arrowprops={"arrowstyle": "-", "lw": 0.3, "color": COLOURS[owner]},
            )  # fmt: skip


def columns(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Ranges of x whose points stand so near that their labels share a column."""
    found: list[tuple[float, float]] = []
    for x in sorted(entry[key] for entry in rows):
        near = found and (x - found[-1][0] < 0.06 if key == "bits" else x < 2.5 * found[-1][0])
        if near:
            found[-1] = (found[-1][0], x)
        else:
            found.append((x, x))
    return found
