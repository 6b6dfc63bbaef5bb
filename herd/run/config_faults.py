"""What is wrong with a configuration, one line a fault: field, value, what is allowed, the nearest valid key.

explain(error)["run.stepz"] == "run.stepz: unknown; did you mean run.steps?"        error: pydantic's
"""

import difflib
import math
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from herd.run import config_text
from herd.run.schema import Config, Section

ALLOWED = {  # pydantic's error type -> what the field takes; {x} comes from the error's context
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text; quote it if it is meant so",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of fields; leave the key out for the defaults",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
    "literal_error": "{expected}",
    "too_short": "at least {min_length} entry",
    "string_pattern_mismatch": "letters, digits and . _ - (the first a letter or digit)",
}
SIBLING_BONUS, NEAR_ENOUGH = 0.1, 0.65  # in units of difflib's ratio
Location = tuple[str | int, ...]


def explain(error: ValidationError) -> dict[str, str]:
    """Dotted path -> its line, for every fault pydantic found."""
    lines: dict[str, str] = {}
    for details in error.errors(include_url=False):
        path, line = _explain_one(details)
        lines.setdefault(path, line)
    return lines


def _explain_one(details: ErrorDetails) -> tuple[str, str]:
    kind, context = details["type"], details.get("ctx", {})
    shown, section = walk(details["loc"])
    path = dotted(shown)
    if kind == "extra_forbidden":
        return path, f"{path}: unknown; {suggest(shown, section)}"
    if kind == "missing":
        return path, f"{path}: missing; give a value ({_meaning(section, shown[-1])})"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tags = ", ".join(_tags(_annotation_at(shown)))
        fault = f" = {context['tag']}" if "tag" in context else " is missing"
        return path, f"{path}.kind{fault}: must be one of {tags}"
    if kind == "value_error":
        return path, f"{path}: {context['error']}"
    needed = ALLOWED[kind].format(**context) if kind in ALLOWED else details["msg"]
    return path, f"{path} = {config_text.write_inline(details['input'])}: must be {needed}"


def walk(location: Location) -> tuple[Location, type[Section]]:
    """The keys of pydantic's location as the user wrote them, and the section that holds the last one."""
    shown, annotation, holder = [], Config, Config
    for part in location:
        if part == "[key]":
            continue
        if _tags(annotation) and part in _tags(annotation):
            annotation = _tags(annotation)[part]
            continue
        shown.append(part)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            holder = annotation
            field = annotation.model_fields.get(part)
            annotation = _bare(field.annotation) if field else Any
        else:
            annotation = _bare(get_args(annotation)[-1]) if get_args(annotation) else Any
    if isinstance(annotation, type) and issubclass(annotation, Section) and location and location[-1] != shown[-1]:
        holder = annotation
    return tuple(shown), holder


def _annotation_at(shown: Location) -> Any:
    """What the value at this path is declared to be."""
    annotation: Any = Config
    for part in shown:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            annotation = annotation.model_fields[part].annotation
        else:
            annotation = get_args(annotation)[-1]
        annotation = _bare(annotation)
    return annotation


def _bare(annotation: Any) -> Any:
    """The annotation without constraints and without "or None"."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        present = [member for member in get_args(annotation) if member is not type(None)]
        return _bare(present[0]) if len(present) == 1 else annotation
    return annotation


def _tags(annotation: Any) -> dict[str, type[Section]]:
    """Value of `kind` -> section, for a union of sections told apart by it; {} for anything else."""
    if get_origin(annotation) not in (Union, UnionType):
        return {}
    sections = [member for member in get_args(annotation) if isinstance(member, type) and issubclass(member, Section)]
    return {get_args(member.model_fields["kind"].annotation)[0]: member for member in sections}


def _meaning(section: type[Section], name: str | int) -> str:
    """What a missing field is for: its documentation, else its type."""
    field = section.model_fields.get(str(name))
    if field is None:
        return "the list is too short"
    if field.description:
        return " ".join(field.description.split()).removesuffix(".")
    return f"one of {', '.join(get_args(field.annotation))}" if get_origin(field.annotation) is Literal else "any"


def suggest(shown: Location, section: type[Section]) -> str:
    """The valid key most like an unknown one, wherever in the tree it lives; the keys of the section if none is."""
    *parents, name = shown
    siblings = {(*parents, field): SIBLING_BONUS for field in section.model_fields}
    bonuses = dict.fromkeys(all_paths(), 0.0) | siblings
    scores = {path: bonus + _likeness(name, path[-1]) for path, bonus in bonuses.items()}
    best = max(scores, key=scores.__getitem__)
    # A field of another kind of the same section (loss.weighting) has this very path.
    if shown in scores or scores[best] < NEAR_ENOUGH:
        return f"allowed here: {', '.join(section.model_fields)}"
    return f"did you mean {dotted(best)}?"


def _likeness(one: str | int, other: str | int) -> float:
    return difflib.SequenceMatcher(None, str(one), str(other)).ratio()


def all_paths(section: type[Section] = Config, above: Location = ()) -> Iterator[Location]:
    """Every key of the tree; NAME stands for a key the user chooses."""
    for name, field in section.model_fields.items():
        yield (*above, name)
        yield from _paths_below(_bare(field.annotation), (*above, name))


def _paths_below(annotation: Any, above: Location) -> Iterator[Location]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield from all_paths(annotation, above)
    elif get_origin(annotation) is dict:
        yield from _paths_below(_bare(get_args(annotation)[1]), (*above, "NAME"))
    else:
        for member in _tags(annotation).values():
            yield from all_paths(member, above)


def dotted(location: Location) -> str:
    """students.scout.quantize.0.scheme"""
    return ".".join(map(str, location))


def plain_faults(value: Any, location: Location = ()) -> Iterator[tuple[str, str]]:
    """(path, line) of everything no field can take: NaN and infinities, keys that are not text, exotic YAML types."""
    path = dotted(location)
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str):
                yield from plain_faults(item, (*location, key))
            else:
                line = f"{dotted((*location, key))}: a key must be text; quote it"
                yield dotted((*location, key)), line
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from plain_faults(item, (*location, index))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"{path} = {config_text.write_inline(value)}: must be a finite number"
    elif not isinstance(value, str | int | float | None):
        yield path, f"{path}: {type(value).__name__} is no value of a configuration; use text, numbers, lists, mappings"
