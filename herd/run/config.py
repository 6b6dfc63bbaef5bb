"""Configurations: load one YAML file with `--set` overrides, write it back, compare two.

config = load("configs/nano.yaml", ["optim.lr=2e-3", "students.tiny.source=scout-nano"])
write_atomic(folder / "config.yaml", dump(config)); blocking_changes(load(folder / "config.yaml"), config)
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from herd.run import config_checks, config_faults, config_overrides, config_text, source_checks
from herd.run.config_checks import check_expert_parallel, split_batch
from herd.run.errors import ConfigError
from herd.run.schema import Config

__all__ = ["blocking_changes", "check_expert_parallel", "diff", "dump", "load", "split_batch"]

# What a resumed run may change: nothing here touches what is computed, only what is kept, shown or made afterwards.
FREE_TO_CHANGE = (
    ("run", "folder"),
    ("run", "checkpoint_every"),
    ("run", "keep_checkpoints"),
    ("run", "evaluate_every"),
    ("run", "ends"),
    ("evaluation",),
    ("tracking",),
    ("students", "*", "quantize"),
)


def load(path: str | Path, overrides: Sequence[str] = (), *, flag: str = "--config") -> Config:
    """Read, override and validate a configuration; `flag` is what the user gave the path with.

    Raises ConfigError: one fault on one line, several one a line under a header that names the file.
    """
    tree = _read(Path(path), flag)
    for override in overrides:
        config_overrides.apply(tree, override)
    lines = dict(config_faults.plain_faults(tree))
    try:
        config = Config.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        lines = config_faults.explain(error) | lines
        raise _refusal(path, overrides, list(lines.values())) from None
    found = [*lines.values(), *config_checks.faults(config)]
    if found:
        raise _refusal(path, overrides, found)
    return config


def _read(path: Path, flag: str) -> dict[str, Any]:
    try:
        tree = config_text.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {flag} takes the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ConfigError(f"{path}: cannot be read ({reason}); {flag} takes the path of a YAML file") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        raise ConfigError(f"{path}: empty; it needs at least run.name, run.steps and one of students")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}; the top level must be a mapping (run: ...)")
    return tree


def _refusal(path: str | Path, overrides: Sequence[str], lines: list[str]) -> ConfigError:
    source = f"{path} with --set" if overrides else f"{path}"
    if len(lines) == 1:
        return ConfigError(f"{source}: {lines[0]}")
    return ConfigError("\n".join([f"{source}: {len(lines)} faults", *(f"  {line}" for line in lines)]))


def dump(config: Config) -> str:
    """YAML text with every field that has a say, which `load` reads back to an equal configuration."""
    silent = {section: set(fields) for section, _, fields in source_checks.replaced(config)}
    return config_text.write(config.model_dump(mode="json", exclude=silent))


def diff(old: Config, new: Config) -> list[str]:
    """`path: old -> new` for every value that differs."""
    return [line for _, line in _differences(old, new)]


def blocking_changes(old: Config, new: Config) -> list[str]:
    """The lines of `diff` that a resumed run must not have: they would change what it computes."""
    steered = new.loss.weighting.kind == "slope"  # by held-out losses: when they are taken changes what is computed
    free = [rule for rule in FREE_TO_CHANGE if not (steered and rule == ("run", "evaluate_every"))]
    return [line for path, line in _differences(old, new) if not any(_under(path, rule) for rule in free)]


def _under(path: tuple[str, ...], rule: tuple[str, ...]) -> bool:
    return len(path) >= len(rule) and all(part in ("*", key) for part, key in zip(rule, path, strict=False))


def _differences(old: Config, new: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    before = dict(_leaves(old.model_dump(mode="json")))
    after = dict(_leaves(new.model_dump(mode="json")))
    for path in before | after:
        was, now = before.get(path, "(absent)"), after.get(path, "(absent)")
        if was != now:
            yield path, f"{'.'.join(path)}: {was} -> {now}"


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, value as text) of everything that is not itself a mapping with something in it; lists stay whole."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    else:
        yield path, config_text.write_inline(value)
