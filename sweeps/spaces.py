"""A search space over configuration paths in Optuna's form: sampled, and put on as overrides.

overrides = suggest(trial, study.space)        # ["optim.lr=0.003", "loss.weighting={kind: lead}"]
"""

from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from herd.run import config_text
from herd.run.schema import Config
from sweeps.ranges import Choices, Range

Space = dict[str, Range | Choices]


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's form of a space. Choices are stored as their YAML text: Optuna keeps plain values only."""
    return {path: _distribution(part) for path, part in space.items()}


def suggest(trial: optuna.Trial, space: Space) -> list[str]:
    """Draw one point; returns its overrides."""
    return overrides({path: trial._suggest(path, found) for path, found in distributions(space).items()}, space)


def overrides(params: dict[str, Any], space: Space) -> list[str]:
    """`--set` words of Optuna's parameters; a number is written so that it reads back as the same number."""
    return [f"{path}={_text(params[path], part)}" for path, part in space.items()]


def defaults(base: Config, space: Space) -> dict[str, Any] | None:
    """Optuna's parameters of the base configuration itself; None where one of its values lies outside the space."""
    found = _base_values(base, space)
    return None if None in found.values() else found


def outside(base: Config, space: Space) -> list[str]:
    """Paths at which the base has a value that is not in the space."""
    return [path for path, value in _base_values(base, space).items() if value is None]


def _base_values(base: Config, space: Space) -> dict[str, Any]:
    """Optuna's parameter of the base's value at every path; None where it is not in the space."""
    tree = base.model_dump(mode="json")
    found = {}
    for path, part in space.items():
        value = _look_up(tree, path)
        if isinstance(part, Choices):
            # Only what the choice says is compared: {kind: lead} is the base's {kind: lead, peak: 0.9, ...}.
            fitting = [choice for choice in part.choices if _agrees(value, choice)]
            found[path] = config_text.write_inline(fitting[0]) if fitting else None
        else:
            inside = isinstance(value, int | float) and _distribution(part)._contains(value)
            found[path] = _number(value, part) if inside else None
    return found


def grid(space: Space) -> dict[str, list[Any]]:
    """Every value of each path, for a grid."""
    return {
        path: _texts(part)
        if isinstance(part, Choices)
        else [_number(part.point(index), part) for index in range(part.count)]
        for path, part in space.items()
    }


def _number(value: float, part: Range) -> int | float:
    """As Optuna draws it: 1 and 1.0 are two points to a storage."""
    return int(value) if part.whole else float(value)


def _distribution(part: Range | Choices) -> BaseDistribution:
    if isinstance(part, Choices):
        return CategoricalDistribution(_texts(part))
    if part.whole:
        return IntDistribution(part.low, part.last, log=part.log, step=int(part.step or 1))
    return FloatDistribution(float(part.low), float(part.last), log=part.log, step=part.step)


def _texts(part: Choices) -> list[str]:
    return [config_text.write_inline(choice) for choice in part.choices]


def _text(value: Any, part: Range | Choices) -> str:
    return value if isinstance(part, Choices) else repr(value)


def _look_up(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[int(key)] if isinstance(tree, list) else tree.get(key) if isinstance(tree, dict) else None
    return tree


def _agrees(value: Any, choice: Any) -> bool:
    if isinstance(choice, dict) and isinstance(value, dict):
        return all(key in value and _agrees(value[key], part) for key, part in choice.items())
    if isinstance(choice, list) and isinstance(value, list):
        return len(choice) == len(value) and all(map(_agrees, value, choice))
    return value == choice
