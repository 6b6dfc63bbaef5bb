"""`--set a.b=c` on the plain tree of a configuration, before it is validated.

apply(tree, "optim.lr=2e-3"); apply(tree, "students.scout.quantize=[int4]")        the value is YAML
"""

from typing import Any

import yaml
from pydantic import BaseModel

from herd.run import config_text
from herd.run.config_faults import walk
from herd.run.errors import ConfigError


def apply(tree: dict[str, Any], override: str) -> None:
    """Set one value in place, making sections on the way. Raises ConfigError when the text or its path is malformed."""
    path, separator, text = override.partition("=")
    if not separator or not all(path.strip().split(".")):
        raise ConfigError(f"--set {override}: write it as KEY=VALUE, such as optim.lr=2e-3")
    try:
        value = config_text.parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is no YAML ({_reason(error)}); quote it") from error
    node: Any = tree
    rest, done = path.strip(), ()
    while True:
        key, rest = _next_key(node, rest)
        key = _index(node, key, done, override)
        done = (*done, key)
        if not rest:
            node[key] = value
            return
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = _seed(done)
        node = node[key]


def _next_key(node: Any, path: str) -> tuple[str, str]:
    """First key of a dotted path and the rest; a key of `node` that holds dots itself counts as one."""
    if isinstance(node, dict):
        known = [key for key in node if isinstance(key, str) and f"{path}.".startswith(f"{key}.")]
        if known:
            key = max(known, key=len)
            return key, path[len(key) + 1 :]
    key, _, rest = path.partition(".")
    return key, rest


def _index(node: Any, key: str, done: tuple[str | int, ...], override: str) -> str | int:
    """The key as this node takes it: text in a mapping, a position in a list."""
    where = ".".join(map(str, done))
    if isinstance(node, dict):
        return key
    if not isinstance(node, list):
        raise ConfigError(f"--set {override}: {where} = {config_text.write_inline(node)} has no fields; set it whole")
    if not key.isdecimal() or int(key) >= len(node):
        raise ConfigError(f"--set {override}: {where} is a list of {len(node)}; give a position, or set it whole")
    return int(key)


def _seed(location: tuple[str | int, ...]) -> dict[str, Any]:
    """A section that is made on the way: empty, or with the default's `kind` where sections differ by it."""
    *_, name = location
    _, section = walk(location)
    field = section.model_fields.get(str(name))
    default = field.default if field else None
    return {"kind": default.kind} if isinstance(default, BaseModel) and "kind" in type(default).model_fields else {}


def _reason(error: yaml.YAMLError) -> str:
    return error.problem if isinstance(error, yaml.MarkedYAMLError) and error.problem else str(error).splitlines()[0]
