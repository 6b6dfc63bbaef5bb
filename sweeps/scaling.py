"""What a study found at small size, put into the configuration of a large run, with the rule behind each value.

scaled = carry(found, small, tree, Fit.read(path)); scaled.tree, scaled.notes
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from herd.llama4.specs import SPECS, find_spec
from herd.run import config_overrides, config_text
from herd.run.errors import ConfigError, DataError
from herd.run.schema import Config, Model, Teacher, Transfer
from sweeps.transfer.settings import TransferCheck

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "intermediate_size_mlp",
    "num_local_experts",
)
"""What the rules look at, and what a small model may differ in."""
SHARED = ("betas", "eps", "weight_decay")
"""Of `optim`: the rules scale these, so they must be the small run's."""
OF_THE_MODEL = (".overrides", ".source", ".transfer", ".quantize")
OF_THE_SIZE = ("run.", "data.", "tokenizer.", "batch.", "parallel.", "tracking.", "evaluation.")
"""Paths of a space that say how large the small run is, and are not carried."""
SAID = {"width": "width", "depth": "depth", "batch": "a step's tokens", "tokens": "the run's tokens"}
RULES = ("depth_exponent", "horizon_exponent", "averages")
"""Of `transfer`: what is the same all the way up."""
NANO = "-nano"
Notes = dict[tuple[str, ...], str]


@dataclass(frozen=True)
class Fit:
    """A transfer check's exponents and what it saw, where one was made."""

    source: str
    rules: dict[str, Any]
    """Fields of `transfer`: the exponent of the horizon, and what else the check went by."""
    notes: dict[str, str]
    """Direction or exponent -> a line."""
    reach: dict[str, int]
    """Direction -> the largest ratio that was looked at."""

    @classmethod
    def read(cls, path: Path) -> "Fit":
        """From a check's transfer.json. Raises ConfigError when there is none, DataError when it is not one."""
        try:
            tree = json.loads(path.read_text())
        except (FileNotFoundError, IsADirectoryError):
            raise ConfigError(f"--fit {path}: no such file; it takes the transfer.json of a transfer check") from None
        except ValueError as error:
            raise DataError(f"--fit {path}: not JSON ({error}); make it with python -m sweeps transfer") from None
        if not isinstance(tree, dict) or not {"grids", "exponents", "settings"} <= tree.keys():
            raise DataError(f"--fit {path}: not a transfer check's; make one with python -m sweeps transfer")
        try:
            return cls._of(path, tree)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"--fit {path}: not a transfer check's ({error!r}); make one with python -m sweeps transfer"
            ) from None

    @classmethod
    def _of(cls, path: Path, tree: dict[str, Any]) -> "Fit":
        settings, exponents = tree["settings"], tree["exponents"]
        rules = {name: settings[name] for name in ("depth_exponent", "averages")}
        notes = {grid["along"]: _seen(grid) for grid in tree["grids"] if grid["ruled"]}
        rules["horizon_exponent"], notes["horizon_exponent"] = _horizon(
            exponents.get("horizon"), settings["horizon_exponent"]
        )
        reach = {grid["along"]: _reach(grid) for grid in tree["grids"] if grid["ruled"]}
        return cls(str(path), rules, notes, reach)


@dataclass
class Scaled:
    tree: dict[str, Any]
    notes: Notes = field(default_factory=dict)

    def put(self, path: tuple[str, ...], value: Any, note: str) -> None:
        """Set a value, making sections on the way."""
        node = self.tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
        self.notes[path] = note


def carry(
    found: Mapping[str, Any], small: Config, large: Config, tree: dict[str, Any], *, who: str, fit: Fit | None
) -> Scaled:
    """The large configuration's tree with the small one's settings and a `transfer` block for every model.

    found: path -> value of what the study searched. who: the trial, for the notes. Raises ConfigError for a model of
    the large run that the small one has no kin of, or that is not fresh.
    """
    scaled = Scaled(tree)
    for path, own, kin in _pairs(small, large):
        rate = kin.lr or small.optim.lr
        scaled.put((*path, "lr"), rate, f"{who}; per tensor the rules of `transfer` multiply it.")
        block = _transfer(own, kin, small, fit)
        note = f"{_distance(own, kin, small, large, fit)}\n{_reasons(block, fit)}"
        scaled.put((*path, "transfer"), block, note)
    for name in SHARED:
        value = getattr(small.optim, name)
        value = list(value) if isinstance(value, tuple) else value
        scaled.put(("optim", name), value, f"{who}; the rules scale it.")
    for path, value in found.items():
        keys = tuple(path.split("."))
        if keys[-1] == "lr" or (keys[0] == "optim" and keys[-1] in SHARED) or _of_the_size(path):
            continue
        if keys[0] in ("teacher", "students"):
            raise ConfigError(
                f"space.{path}: there is no rule that carries it to another model; set it in --to by hand"
            )
        config_overrides.apply(scaled.tree, f"{path}={config_text.write_inline(value)}")
        scaled.notes[keys] = f"{who}; as it was found: there is no rule for it."
    return scaled


def _pairs(small: Config, large: Config) -> Iterator[tuple[tuple[str, ...], Model | Teacher, Model | Teacher]]:
    """(path in the large configuration, its model, the small run's model of the same kind)."""
    if large.teacher.mode == "codistill" and large.teacher.source in SPECS:
        if small.teacher.mode != "codistill":
            raise ConfigError(
                f"teacher.mode = codistill in --to, {small.teacher.mode} in the study: it never trained a teacher; "
                "use a study that does, or a frozen teacher"
            )
        yield ("teacher",), large.teacher, _checked("teacher", large.teacher, {"teacher": small.teacher})
    for name, student in large.students.items():
        yield ("students", name), student, _checked(f"students.{name}", student, dict(small.students))


def _checked(where: str, own: Model | Teacher, kin: Mapping[str, Model | Teacher]) -> Model | Teacher:
    if own.source not in SPECS:
        raise ConfigError(f"{where}.source = {own.source}: trained already; rules are for fresh models of a spec")
    same = {name: model for name, model in kin.items() if _kind(model.source) == _kind(own.source)}
    if not same:
        trained = ", ".join(dict.fromkeys(model.source for model in kin.values()))
        raise ConfigError(
            f"{where}.source = {own.source}: the study trained models of another kind ({trained}); "
            f"use a study with a {_kind(own.source)}{NANO}"
        )
    name = where.rpartition(".")[2]
    if len(same) > 1 and name not in same:
        raise ConfigError(
            f"{where}: the study trained several of its kind ({', '.join(same)}); call it like one of them"
        )
    return same.get(name) or next(iter(same.values()))


def _kind(source: str) -> str:
    return source.removesuffix(NANO)


def _transfer(own: Model | Teacher, kin: Model | Teacher, small: Config, fit: Fit | None) -> dict[str, Any]:
    """The block of a large model. Rates of a kin that was itself carried there are those of the model at the bottom."""
    step_tokens, tokens = _tokens(kin, small)
    before, rules = _sizes(kin), fit.rules if fit else {}
    if kin.transfer is not None:
        before = before | kin.transfer.overrides
        step_tokens, tokens = kin.transfer.batch_tokens or step_tokens, kin.transfer.tokens or tokens
        held = {name: getattr(kin.transfer, name) for name in RULES}
        if fit and (other := {name for name, value in fit.rules.items() if value != held[name]}):
            name = min(other)
            raise ConfigError(
                f"--fit {fit.source}: {name} = {fit.rules[name]}, and the study's own base was carried by "
                f"{held[name]}; one climb has one rule: leave --fit out, or begin at the bottom with it"
            )
        rules = held
    here = _sizes(own)
    overrides = {name: value for name, value in before.items() if value != here[name]}
    return {"overrides": overrides, "batch_tokens": step_tokens, "tokens": tokens} | rules


def _tokens(model: Model | Teacher, run: Config) -> tuple[int, int]:
    """Tokens of a step, and of all steps the model makes."""
    step_tokens = run.batch.rows * run.data.sequence_length
    return step_tokens, step_tokens * (run.run.steps + (run.teacher.head_start if isinstance(model, Teacher) else 0))


def _distance(own: Model | Teacher, kin: Model | Teacher, small: Config, large: Config, fit: Fit | None) -> str:
    """How far from the study's model this one is, and where further than the check (the default's sizes) has been."""
    before, here = _sizes(kin), _sizes(own)
    (step_before, tokens_before), (step_here, tokens_here) = _tokens(kin, small), _tokens(own, large)
    ratios = {
        "width": here["hidden_size"] / before["hidden_size"],
        "depth": here["num_hidden_layers"] / before["num_hidden_layers"],
        "batch": step_here / step_before,
        "tokens": tokens_here / tokens_before,
    }
    heads = before["head_dim"], here["head_dim"]
    other = f"; head_dim goes from {heads[0]} to {heads[1]}, which no rule covers" if heads[0] != heads[1] else ""
    reach = fit.reach if fit else {along: max(grid.factors) for along, grid in TransferCheck().grids.items()}
    seen = ", ".join(f"{SAID[a]} x{reach.get(a, 1)}" for a, ratio in ratios.items() if ratio > reach.get(a, 1))
    warning = f"\nBeyond what the check has seen ({seen}): climb in stages, see docs/transfer.md." if seen else ""
    distances = ", ".join(f"{SAID[along]} x{ratio:,.6g}" for along, ratio in ratios.items())
    stage = ", itself carried there: rates stay those of the model at the bottom" if kin.transfer else ""
    return f"From the study's model{stage}: {distances}{other}.{warning}"


def _sizes(model: Model | Teacher) -> dict[str, Any]:
    config = find_spec(model.source).config(**model.overrides)
    return {name: getattr(config, name) for name in SIZES}


def _reasons(block: Mapping[str, Any], fit: Fit | None) -> str:
    rules = Transfer(**block)
    lines = [
        "Complete(d)P, arXiv 2512.22382 (herd/llama4/transfer.py): matrices by width ratio (rate 1/m, spread m^-0.5), "
        "branches by depth ratio^-1, rate by sqrt(batch ratio) x token ratio^-horizon_exponent.",
        f"Here horizon_exponent is {rules.horizon_exponent}; Adam's averages reach over the same {rules.averages}.",
    ]
    if fit is None:
        lines.append("Exponents are theirs: no transfer check was given (--fit).")
    else:
        lines += [f"Fit, {fit.source}:", *(f"  {along}: {line}" for along, line in fit.notes.items())]
    return "\n".join(lines)


def _horizon(fitted: Mapping[str, Any] | None, assumed: float) -> tuple[float, str]:
    """The exponent of the horizon and why: the fitted one only where the check rules out the one it assumed."""
    if fitted is None:
        return assumed, f"{assumed}, as assumed: the check has no grid over tokens"
    value, ends = fitted["value"], fitted["interval"]
    if ends is None:
        return assumed, f"{assumed}, as assumed: the fit, {value:.2f}, is of one seed"
    shown = f"{value:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"
    if ends[0] <= assumed <= ends[1]:
        return assumed, f"{assumed}, as assumed: the fit, {shown}, does not rule it out"
    kept = round(min(1.0, max(0.0, value)), 3)
    return kept, f"{kept} by the fit, {shown}, which rules out {assumed}"


def _seen(grid: Mapping[str, Any]) -> str:
    slope, ends = grid["slope"]["value"], grid["slope"]["interval"]
    shown = f"{slope:+.2f}" + (f" [{ends[0]:+.2f}, {ends[1]:+.2f}]" if ends else "")
    return (
        f"seen to x{_reach(grid)}: best rate's slope {shown}, moved {grid['moved']:.1f} steps of 2^0.5, "
        f"carrying over cost {grid['excess']:.2%}"
    )


def _reach(grid: Mapping[str, Any]) -> int:
    return max(size["factor"] for size in grid["sizes"])


def _of_the_size(path: str) -> bool:
    return path.startswith(OF_THE_SIZE) or any(f"{part}." in f"{path}." for part in OF_THE_MODEL)
