"""What is wrong with a configuration, one line a fault: field, value, what is allowed, the nearest valid key.

explain(error)["run.stepz"] == "run.stepz: unknown; did you mean run.steps?"        error: pydantic's
"""

import difflib
import math
import re
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
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
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
    "too_short": "of length {min_length} or more",
    "string_too_short": "text of length {min_length} or more",
    "string_pattern_mismatch": "letters, digits and . _ - (the first a letter or digit)",
}
SIBLING_BONUS, NEAR_ENOUGH = 0.1, 0.65  # in units of difflib's ratio
Location = tuple[str | int, ...]
SCALARS = {"bool", "int", "float", "str"}  # of a union of these pydantic reports what each makes of a value
MEMBER = re.compile(r"^(?:function-after\[\w+\(\), )?([A-Z]\w*)\]?$")  # how pydantic names a section in a location


def explain(error: ValidationError, root: type[Section] = Config) -> dict[str, str]:
    """Dotted path -> its line, for every fault pydantic found in a tree of that kind."""
    lines: dict[str, str] = {}
    for details in _of_the_nearest_member(error.errors(include_url=False), root):
        path, line = _explain_one(details, root)
        lines.setdefault(path, line)
    return lines


def _of_the_nearest_member(faults: list[ErrorDetails], root: type[Section]) -> list[ErrorDetails]:
    """Of a union of sections without `kind` pydantic lists what every member lacks: keep the one with fewest faults."""
    members = [_member(each["loc"], root) for each in faults]
    best: dict[Location, Location] = {}
    for member in filter(None, members):
        best[member[:-1]] = min(best.get(member[:-1], member), member, key=members.count)
    return [each for each, member in zip(faults, members, strict=True) if not member or best[member[:-1]] == member]


def _member(location: Location, root: type[Section]) -> Location:
    """The location up to where it names the member of such a union; empty where there is none."""
    for end, part in enumerate(location, start=1):
        # What names a member is no key: the path stays as long as it was.
        if MEMBER.search(str(part)) and len(walk(location[:end], root)[0]) == len(walk(location[: end - 1], root)[0]):
            return location[:end]
    return ()


def _explain_one(details: ErrorDetails, root: type[Section]) -> tuple[str, str]:
    kind, context = details["type"], details.get("ctx", {})
    shown, section = walk(details["loc"], root)
    path = dotted(shown)
    if kind == "extra_forbidden":
        return path, f"{path}: unknown; {suggest(shown, section, root)}"
    if kind == "missing":
        return path, f"{path}: missing; give a value ({_meaning(section, shown[-1])})"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tags = ", ".join(_tags(_annotation_at(shown, root)))
        fault = f" = {context['tag']}" if "tag" in context else " is missing"
        return path, f"{path}.kind{fault}: must be one of {tags}"
    if kind == "value_error":
        return path, f"{path}: {context['error']}".removeprefix(": ")
    needed = ALLOWED[kind].format(**context) if kind in ALLOWED else details["msg"]
    return path, f"{path} = {config_text.write_inline(details['input'])}: must be {needed}"


def walk(location: Location, root: type[Section] = Config) -> tuple[Location, type[Section]]:
    """The keys of pydantic's location as the user wrote them, and the section that holds the last one."""
    shown, annotation, holder = [], root, root
    for part in location:
        if part == "[key]":
            continue
        if _tags(annotation) and part in _tags(annotation):
            annotation = _tags(annotation)[part]
            continue
        if get_origin(annotation) in (Union, UnionType) and part in SCALARS & {
            getattr(one, "__name__", "") for one in get_args(annotation)
        }:
            continue
        if (member := _members(annotation).get(MEMBER.sub(r"\1", str(part)))) is not None:
            annotation = holder = member
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


def _annotation_at(shown: Location, root: type[Section]) -> Any:
    """What the value at this path is declared to be."""
    annotation: Any = root
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
    sections = _members(annotation).values()
    return {
        get_args(member.model_fields["kind"].annotation)[0]: member
        for member in sections
        if "kind" in member.model_fields
    }


def _members(annotation: Any) -> dict[str, type[Section]]:
    """Class name -> section, for a union of them; {} for anything else."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    return {each.__name__: each for each in members if isinstance(each, type) and issubclass(each, Section)}


def _meaning(section: type[Section], name: str | int) -> str:
    """What a missing field is for: its documentation, else its type."""
    field = section.model_fields.get(str(name))
    if field is None:
        return "the list is too short"
    if field.description:
        return " ".join(field.description.split()).removesuffix(".")
    return f"one of {', '.join(get_args(field.annotation))}" if get_origin(field.annotation) is Literal else "any"


def suggest(shown: Location, section: type[Section], root: type[Section] = Config) -> str:
    """The valid key most like an unknown one, wherever in the tree it lives; the keys of the section if none is."""
    *parents, name = shown
    siblings = {(*parents, field): SIBLING_BONUS for field in section.model_fields}
    bonuses = dict.fromkeys(all_paths(root), 0.0) | siblings
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
        for member in _members(annotation).values():
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
