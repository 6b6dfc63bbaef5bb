"""Quality against bits, and against time, one panel of each for every model. Colour: package; shape: method.

draw(results, Path("docs/img/quantisation.png"))
"""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLOURS = {
    "ours": "#0b6e4f",
    "llm-compressor": "#d1495b",
    "auto-round": "#2e6fb7",
    "gptqmodel": "#7b2d8b",
    "bitsandbytes": "#e09f3e",
    "hqq": "#00a5cf",
    "torchao": "#6c757d",
    "Meta": "#111111",
}
SHAPES = {"nearest": "o", "gptq": "s", "gptq-gated": "X", "awq": "^", "hqq": "D", "sign gradients": "P", "nf4": "*"}
DODGE = 0.005  # bits between packages that take the same


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the figure."""
    figure = Figure(figsize=(12.5, 5.2 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(results), 2, squeeze=False, sharey="row")
    for (left, right), (model, result) in zip(panels, results.items(), strict=True):
        rows = [entry for entry in result["table"] if "error" not in entry and entry["bits"] < 6]
        # Eight bits are a matter of their own: several times lower. So is what is broken.
        usual = statistics.median(entry["kl"] for entry in rows)
        rows = [entry for entry in rows if entry["kl"] < 5 * usual]
        for entry in rows:
            step = (list(COLOURS).index(package(entry)) - len(COLOURS) / 2) * DODGE
            point(left, entry, entry["bits"] + step)
            point(right, entry, entry["cpu_seconds"])
        left.set(title=f"{model}: quality against bits", xlabel="bits per quantised weight (packages side by side)")
        left.set_ylabel("mean KL to bf16, nats a token (lower is better)")
        right.set(title=f"{model}: quality against time", xlabel="CPU seconds to quantise", xscale="log")
        for axes in (left, right):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=keys(), loc="outside right upper", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def point(axes: Axes, entry: dict[str, Any], x: float) -> None:
    """One row with its 95 % interval over documents; hollow for groups of 64 or blocks of 64."""
    low, high = entry["kl_ci95"]
    small = "g64" in entry["name"] or "nf4" in entry["name"]
    axes.errorbar(
        x, entry["kl"], yerr=[[entry["kl"] - low], [high - entry["kl"]]], fmt=SHAPES[method(entry["name"])],
        color=COLOURS[package(entry)], markersize=8, elinewidth=0.8, markerfacecolor="white" if small else None,
    )  # fmt: skip


def package(entry: dict[str, Any]) -> str:
    """Whose recipe a row is."""
    return "Meta" if entry["name"].startswith("Meta") else entry["peer"]


def method(name: str) -> str:
    """The kind of method a row's name stands for."""
    words = name.split()
    if ("rtn" not in words and words[0] == "auto-round") or "signround" in words:
        return "sign gradients"
    return next((kind for kind in ("gptq-gated", "gptq", "awq", "hqq", "nf4") if kind in words), "nearest")


def keys() -> list[Line2D]:
    """The legend."""
    packages = [Line2D([], [], marker="o", linestyle="", color=colour, label=name) for name, colour in COLOURS.items()]
    methods = [Line2D([], [], marker=s, linestyle="", color="#444444", label=kind) for kind, s in SHAPES.items()]
    hollow = Line2D([], [], marker="o", linestyle="", color="#444444", markerfacecolor="white", label="groups of 64")
    return [*packages, *methods, hollow]
