"""The YAML dialect of our configurations: YAML 1.2 numbers and booleans, no repeated keys, safe types only.

    parse("lr: 2e-3") == {"lr": 0.002}; write({"lr": 0.002}) == "lr: 0.002\\n"

PyYAML follows YAML 1.1, where 2e-3 is a string, `no` is false, 010 is 8 and 1:30 is 90.
"""

import re
from typing import Any

import yaml

SCALARS = (  # tag, pattern, first characters ("" for the empty scalar)
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
)
EXOTIC_BREAKS = re.compile("[\x85\u2028\u2029]")


def _by_first_character() -> dict[str, list[tuple[str, re.Pattern]]]:
    """SCALARS in the form PyYAML looks them up."""
    resolvers: dict[str, list[tuple[str, re.Pattern]]] = {}
    for tag, pattern, first in SCALARS:
        for character in first:
            resolvers.setdefault(character, []).append((f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z")))
    return resolvers


class Loader(yaml.SafeLoader):
    """SafeLoader with our scalars; a key given twice is an error."""

    yaml_implicit_resolvers = _by_first_character()

    def construct_document(self, node: yaml.Node) -> Any:
        """The whole of it at once, so that a list that holds itself is an error."""
        return self.construct_object(node, deep=True)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """As SafeLoader's. Raises ConstructorError for a repeated key."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key.value}` is given twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _either_dialect() -> dict[str, list[tuple[str, re.Pattern]]]:
    """Our scalars, then those of YAML 1.1."""
    ours, old = _by_first_character(), yaml.SafeDumper.yaml_implicit_resolvers
    return {character: ours.get(character, []) + old.get(character, []) for character in {*ours, *old}}


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string that Loader, or another YAML reader, would not read as one."""

    yaml_implicit_resolvers = _either_dialect()

    def ignore_aliases(self, data: Any) -> bool:
        """Write repeated values out: a configuration is for reading."""
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """As SafeDumper's, with line breaks that PyYAML would write raw and read back as spaces escaped."""
        style = '"' if EXOTIC_BREAKS.search(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    yaml_representers = {**yaml.SafeDumper.yaml_representers, str: represent_str}


def parse(text: str) -> Any:
    """Value of one YAML document. Raises yaml.YAMLError with the line of the fault."""
    try:
        return yaml.load(text, Loader=Loader)
    except RecursionError:
        raise yaml.YAMLError("lists or mappings are nested too deeply") from None


def write(value: Any) -> str:
    """YAML text of plain values that `parse` reads back equal; mappings keep their order."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def write_inline(value: Any) -> str:
    """The same on one line, for messages: {scheme: int4, group_size: 64}."""
    text = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**9, default_flow_style=True)
    return " ".join(text.removesuffix("\n").removesuffix("\n...").split("\n"))
