"""Paired comparisons of the runs of benchmarks/weighting.py, and the tables of docs/weighting.md.

    cells = compare(runs); print(differences_table(cells)); print(goals_table(cells))

A difference is student minus reference in KL to the truth (or held-out loss), nats, seed by seed: below 0 is better.
"""

import statistics
from typing import Any

from quality import interval

ALONE = "alone"
MEASURES = {"kl": "KL to the truth", "ce": "held-out loss"}
CONTESTED = ("good", "weak", "co")
"""Teachers whose cells count as won or lost; the others ask for no regret only."""


def is_constant(arm: str) -> bool:
    """`0.3 at 2`: a constant weight and its temperature."""
    return arm[0].isdigit()


def compare(runs: dict[str, Any], *, measure: str = "kl") -> dict[str, Any]:
    """Every cell: its best constant, chosen in hindsight by the mean over seeds, and every arm against it and alone."""
    cells: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        cell, seed = name.rsplit("/", 1)
        cells.setdefault(cell, {})[seed] = run
    return {cell: _compared(by_seed, measure) for cell, by_seed in cells.items()}


def _compared(runs: dict[str, Any], measure: str) -> dict[str, Any]:
    names = list(dict.fromkeys(arm for run in runs.values() for arm in run["arms"]))
    found = {arm: {seed: run["arms"][arm] for seed, run in runs.items() if arm in run["arms"]} for arm in names}
    nats, ce = (
        {arm: {seed: run[what] for seed, run in of_seed.items()} for arm, of_seed in found.items()}
        for what in (measure, "ce")
    )
    # Lowest against alone, so that constants measured with fewer seeds are compared fairly.
    best = min(filter(is_constant, nats), key=lambda arm: difference(nats[arm], nats[ALONE])["mean"])
    pairs = {arm: twin for arm in nats if (twin := at_temperature_1(arm)) in nats}
    return {
        "seeds": len(runs),
        "measure": measure,
        "teacher": statistics.mean(run[f"teacher_{measure}"] for run in runs.values()),
        "best_constant": best,
        "at_2_to_1": {arm: difference(nats[arm], nats[twin]) for arm, twin in pairs.items()},
        "arms": {
            arm: {
                measure: statistics.mean(nats[arm].values()),
                "to_alone": difference(nats[arm], nats[ALONE]),
                "to_best_constant": difference(nats[arm], nats[best]),
                "heldout_to_alone": difference(ce[arm], ce[ALONE]),
                "alpha_by_fifth": _means([run.get("alpha", []) for run in found[arm].values()]),
            }
            for arm in nats
        },
    }


def at_temperature_1(arm: str) -> str | None:
    """The name of an arm at temperature 2, `0.9 at 2` or `maturity at 2`, at temperature 1, where a design has none."""
    if not arm.endswith(" at 2"):
        return None
    weight = arm.removesuffix(" at 2")
    return f"{weight} at 1" if weight[-1].isdigit() else weight


def difference(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    """Mean of the differences paired by seed, its 95 % Student interval, and the worst seed."""
    differences = [nats - theirs[seed] for seed, nats in ours.items() if seed in theirs]
    mean = statistics.mean(differences)
    return {"mean": mean, "ci95": interval(differences), "worst": max(differences), "seeds": len(differences)}


def _means(rows: list[list[float]]) -> list[float]:
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def differences_table(cells: dict[str, Any]) -> str:
    """Markdown: every arm's mean difference to the student alone, by cell; (seeds) where some are missing."""
    arms = [arm for arm in next(iter(cells.values()))["arms"] if arm != ALONE]
    lines = [f"| | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
    measure = next(iter(cells.values()))["measure"]
    what = MEASURES[measure]
    lines.append(_line(f"alone: {what}", [f"{cell['arms'][ALONE][measure]:.3f}" for cell in cells.values()]))
    lines.append(_line(f"teacher: {what}", [f"{cell['teacher']:.3f}" for cell in cells.values()]))
    lines.append(_line("best constant", [cell["best_constant"] for cell in cells.values()]))
    lines += [_line(arm, [_shown(cell, arm) for cell in cells.values()]) for arm in arms]
    return "\n".join(lines)


def _line(name: str, values: list[str]) -> str:
    return f"| {name} | {' | '.join(values)} |"


def _shown(cell: dict[str, Any], arm: str) -> str:
    if arm not in cell["arms"]:
        return ""
    found = cell["arms"][arm]
    text = f"{1000 * found['to_alone']['mean']:+.0f}"
    text = f"**{text}**" if arm == cell["best_constant"] else text
    return text + _seeds(cell, found["to_alone"])


def _seeds(cell: dict[str, Any], found: dict[str, Any]) -> str:
    """How many, where some are missing."""
    return "" if found["seeds"] == cell["seeds"] else f" ({found['seeds']})"


def temperatures_table(cells: dict[str, Any]) -> str:
    """Markdown: every arm at temperature 2 against itself at 1, with intervals."""
    arms = next(iter(cells.values()))["at_2_to_1"]
    lines = [f"| at 2 against 1 | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
    for arm in arms:
        found = [(cell, cell["at_2_to_1"].get(arm)) for cell in cells.values()]
        shown = [_with_interval(pair) + _seeds(cell, pair) if pair else "" for cell, pair in found]
        lines.append(_line(arm.removesuffix(" at 2"), shown))
    return "\n".join(lines)


def intervals_table(cells: dict[str, Any], chosen: list[str]) -> str:
    """Markdown: some designs against the best constant and against the student alone, with intervals."""
    lines = ["| cell | best constant | design | to the best constant | to alone | worst seed | alpha by fifth |"]
    lines.append("|---" * 7 + "|")
    for name, cell in cells.items():
        for arm in filter(cell["arms"].__contains__, chosen):
            found = cell["arms"][arm]
            alphas = ", ".join(f"{alpha:.2f}" for alpha in found["alpha_by_fifth"])
            both = " | ".join(_with_interval(found[key]) for key in ("to_best_constant", "to_alone"))
            worst = 1000 * found["to_alone"]["worst"]
            arm += _seeds(cell, found["to_alone"])
            lines.append(f"| {name} | {cell['best_constant']} | {arm} | {both} | {worst:+.1f} | {alphas} |")
    return "\n".join(lines)


def _with_interval(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{1000 * found['mean']:+.1f} [{1000 * low:+.1f}, {1000 * high:+.1f}]"


def goals(cells: dict[str, Any], arm: str) -> dict[str, Any]:
    """What one arm does of what is wanted: no regret anywhere, near the best constant of a good teacher, wins."""
    found = {name: cell["arms"][arm] for name, cell in cells.items() if arm in cell["arms"]}
    to_alone = {name: compared["to_alone"]["mean"] for name, compared in found.items()}
    to_best = {name: found[name]["to_best_constant"] for name in found if name.split("/")[0] in CONTESTED}
    worst = max(to_alone, key=lambda name: to_alone[name])
    return {
        "most_regret": to_alone[worst],
        "where": worst,
        "behind_best_of_good": max(to_best[name]["mean"] for name in to_best if name.startswith("good")),
        "contested": len(to_best),
        "wins": sum(won["mean"] < 0 for won in to_best.values()),
        "sure_wins": sum(won["ci95"][1] < 0 for won in to_best.values()),
        "mean_to_best": statistics.mean(won["mean"] for won in to_best.values()),
    }


def goals_table(cells: dict[str, Any]) -> str:
    """Markdown: the goals of every design, and of the constants for comparison, the least regret first."""
    rows = {arm: goals(cells, arm) for arm in next(iter(cells.values()))["arms"] if arm != ALONE}
    lines = ["| arm | most regret | where | behind the best constant of a good teacher | wins (sure) | mean |"]
    lines.append("|---" * 6 + "|")
    for arm, found in sorted(rows.items(), key=lambda row: row[1]["mean_to_best"]):
        wins = f"{found['wins']} of {found['contested']} ({found['sure_wins']})"
        nats = [f"{1000 * found[key]:+.0f}" for key in ("most_regret", "behind_best_of_good", "mean_to_best")]
        lines.append(f"| {arm} | {nats[0]} | {found['where']} | {nats[1]} | {wins} | {nats[2]} |")
    return "\n".join(lines)
