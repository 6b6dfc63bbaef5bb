"""Which scheme each layer is stored in: one for all of them, or one for each set of layers that servers merge.

allocation = Allocation.uniform(Scheme.named("int4"))
allocation, kept = allocate({"*": "int4-g64", "*.experts": "int4-g128"}, layer_names)     # kept: layers left in bf16
allocation.of("model.layers.0.feed_forward.experts.3.up_proj")                             # Scheme int4-g128
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from herd.run.errors import ConfigError
from quant.architectures import EXPERT_BANK, weight_tie
from quant.readers import COMPRESSED, GROUP_SIZES, SCHEMES
from quant.schemes import Scheme

LINEAR = "Linear"
BF16 = "bf16"
MIXED = "mixed"
# Input ranges of fp8-static come from rows, which an allocation does not name. transformers loads int4-asym only if it
# unpacks while loading, and formats that round activations only if it does not.
ALONE = ("fp8-static", "int4-asym")


@dataclass(frozen=True)
class Allocation:
    parts: tuple[tuple[str, Scheme], ...]
    """Target, as compressed-tensors writes it (`Linear`, a layer's name, or an expression after `re:`), and scheme."""

    @classmethod
    def uniform(cls, scheme: Scheme) -> "Allocation":
        """One scheme for every layer that is quantised."""
        return cls(((LINEAR, scheme),))

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The different schemes, in the order of their first layers."""
        return tuple(dict.fromkeys(scheme for _, scheme in self.parts))

    @property
    def container(self) -> str:
        return self.parts[0][1].container

    @property
    def name(self) -> str:
        """`int4`, or `mixed`."""
        return self.schemes[0].name if len(self.schemes) == 1 else MIXED

    @property
    def label(self) -> str:
        """`int4-g64`, or `mixed`."""
        return self.schemes[0].label if len(self.schemes) == 1 else MIXED

    def of(self, layer: str) -> Scheme | None:
        """The scheme of a layer that is quantised; None when no target matches it."""
        exact = self._exact.get(layer) or self._exact.get(LINEAR)
        return exact or next((scheme for pattern, scheme in self._patterns if pattern.match(layer)), None)

    @cached_property
    def _exact(self) -> dict[str, Scheme]:
        return {target: scheme for target, scheme in self.parts if not target.startswith("re:")}

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern, Scheme]]:
        return [(re.compile(target[3:]), scheme) for target, scheme in self.parts if target.startswith("re:")]


def group_of(layer: str) -> str:
    """What layers that servers merge have in common, and so their scheme: q+k+v, gate+up, a whole expert bank."""
    bank = EXPERT_BANK.match(layer)
    return bank["bank"] if bank else weight_tie(layer)


def group_layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Group -> its layers, in their order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group_of(name), []).append(name)
    return groups


def allocate(choices: Mapping[str, str], names: Iterable[str]) -> tuple[Allocation, list[str]]:
    """Resolve `group or glob over groups -> label` for the layers that may be quantised; a later match wins.

    Returns the allocation and the layers it leaves in bf16. ConfigError for a label or group that is unknown (naming
    the nearest), or a group nothing is said about.
    """
    groups = group_layers(names)
    if not groups:
        raise ConfigError("allocation: no layer is left to quantise; drop an --ignore pattern")
    labels: dict[str, str] = {}
    for pattern, label in choices.items():
        matched = [group for group in groups if group == pattern or fnmatchcase(group, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, groups, n=1, cutoff=0.0)[0]
            what = "matches no group of layers (of those that are not in bf16 anyway)"
            raise ConfigError(f"allocation: {pattern!r} {what}; the nearest is {near!r}")
        labels |= dict.fromkeys(matched, label)
    silent = next((group for group in groups if group not in labels), None)
    if silent is not None:
        raise ConfigError(f'allocation: nothing is said about {silent!r}; add it, or a default: "*": "{BF16}"')
    schemes = {label: labelled(label) for label in dict.fromkeys(labels.values())}
    kept = [name for group, layers in groups.items() if schemes[labels[group]] is None for name in layers]
    chosen = {group: scheme for group in groups if (scheme := schemes[labels[group]]) is not None}
    if not chosen:
        raise ConfigError(f"allocation: every group stays in {BF16}; give one of them another scheme")
    if len(set(chosen.values())) == 1:
        return Allocation.uniform(next(iter(chosen.values()))), kept
    parts = [(target, scheme) for group, scheme in chosen.items() for target in _targets(group, groups[group])]
    order = list(dict.fromkeys(scheme for _, scheme in parts))
    return Allocation(tuple(sorted(parts, key=lambda part: order.index(part[1])))), kept


def labelled(label: str) -> Scheme | None:
    """The scheme of a label such as `int4-g64`, `int4-channel` or `fp8`; None for `bf16`."""
    if label == BF16:
        return None
    known = {scheme.label: scheme for scheme in _mixable()}
    if label not in known:
        longer = [name for name in known if name.startswith(f"{label}-g")]
        near = longer[0] if longer else difflib.get_close_matches(str(label), [BF16, *known], n=1, cutoff=0.0)[0]
        raise ConfigError(f"{label!r} is no choice; the nearest is {near}; choices: {', '.join([BF16, *known])}")
    return known[label]


def _mixable() -> list[Scheme]:
    names = [name for name, kind in SCHEMES.items() if COMPRESSED in kind.containers and name not in ALONE]
    return [
        Scheme.named(name, size, COMPRESSED)
        for name in names
        for size in (GROUP_SIZES if SCHEMES[name].grouped else (64,))
    ]


def _targets(group: str, names: list[str]) -> list[str]:
    """An expression for an expert bank, whose names are many; exact names for the others."""
    if EXPERT_BANK.match(names[0]):
        return [rf"re:{re.escape(group)}\.\d+\.(gate_proj|up_proj|down_proj)$"]
    return names
