"""YAML text with comments: a line above the keys that have something to say.

text = write(tree, {("optim", "lr"): "found by trial 7 of rates"})
"""

import re
import textwrap
from collections.abc import Mapping
from typing import Any

from herd.run import config_text

WIDTH = 118
_KEY = re.compile(r"(?P<indent> *)(?P<key>[^\s:#'\"{\[-][^:]*):(?: |$)")


def write(tree: Mapping[str, Any], notes: Mapping[tuple[str, ...], str], *, header: str = "") -> str:
    """The tree as YAML that reads back equal, the header first, each note above its key (keys without colons)."""
    out = _comment(header, 0) if header else []
    path: list[tuple[int, str]] = []
    for line in config_text.write(dict(tree)).splitlines():
        found = _KEY.match(line)
        if found:
            indent = len(found["indent"])
            path = [*(part for part in path if part[0] < indent), (indent, found["key"])]
            note = notes.get(tuple(key for _, key in path))
            if note:
                out += _comment(note, indent)
        out.append(line)
    return "\n".join(out) + "\n"


def _comment(text: str, indent: int) -> list[str]:
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, WIDTH - indent - 2)]
    return [f"{' ' * indent}# {line}" for line in lines]
