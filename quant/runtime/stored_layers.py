"""Which kernel a folder's layers get, and the layers themselves from their stored tensors.

kinds = kinds_of(quantization_config)                # None: no kernel of this package runs one of its schemes
layers = StoredLayers(files, kinds, crossovers)
layers.make(["model.layers.0.mlp.up_proj"])          # several names: one layer, fused by rows
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from herd.run.errors import DataError
from quant.allocations import LINEAR
from quant.formats.grid import Grid
from quant.formats.packed import PackedIntegers
from quant.runtime.crossovers import Crossovers
from quant.runtime.fp8 import Fp8
from quant.runtime.int4 import Int4, find_block
from quant.runtime.int8 import Int8
from quant.runtime.linears import Linear, Plain


@dataclass(frozen=True)
class Kind:
    """How quantised layers are stored."""

    name: str
    """`int4`, `int8` or `fp8`."""
    mark: str
    """Suffix of the tensor that tells a quantised layer."""
    suffixes: tuple[str, ...]
    """Suffixes of all the tensors it is stored as."""
    rounds_inputs: bool
    group_size: int | None = None
    """Input channels that share a scale; None: all of a row."""


class Kinds:
    """The kind of every layer of a folder: of the first target that names it, else of its class."""

    def __init__(self, groups: list[tuple[list[str], Kind]], ignored: Sequence[str] = ()):
        self._ignored = [name for name in ignored if not name.startswith("re:")]
        self._ignoring = [re.compile(name[3:]) for name in ignored if name.startswith("re:")]
        targets = [(target, kind) for names, kind in groups for target in names]
        self._exact = {target: kind for target, kind in reversed(targets) if not target.startswith("re:")}
        self._patterns = [(re.compile(target[3:]), kind) for target, kind in targets if target.startswith("re:")]

    def of(self, name: str) -> Kind | None:
        """The kind of the layer of that name; None for one that no group holds."""
        if name in self._exact:
            return self._exact[name]
        found = next((kind for pattern, kind in self._patterns if pattern.match(name)), None)
        return found or self._exact.get(LINEAR)

    def ignores(self, name: str) -> bool:
        """Whether the section says that the layer is not quantised."""
        return name in self._ignored or any(pattern.match(name) for pattern in self._ignoring)


def kinds_of(section: dict[str, Any]) -> Kinds | None:
    """The kinds of a compressed-tensors section; None when any of its groups has a scheme without a kernel here."""
    groups = list((section.get("config_groups") or {}).values())
    if section.get("quant_method") != "compressed-tensors" or not groups:
        return None
    kinds = [kind_of(group) for group in groups]
    if None in kinds:
        return None
    # With one group, what is stored quantised is of that group, whatever names and classes it was matched by.
    targets = [[LINEAR]] if len(groups) == 1 else [group.get("targets") or [] for group in groups]
    return Kinds(list(zip(targets, kinds, strict=True)), section.get("ignore") or [])


def kind_of(group: dict[str, Any]) -> Kind | None:
    """The kind of a group of layers; None for any scheme without a kernel here."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    if not weights.get("symmetric") or weights.get("actorder") == "group" or group.get("output_activations"):
        return None
    scheme = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
    rounds = inputs is not None
    if rounds and (inputs.get("strategy"), inputs.get("dynamic"), inputs.get("symmetric")) != ("token", True, True):
        return None
    if scheme in (("int", 4, "group"), ("int", 4, "channel")) and not rounds:
        suffixes = ("weight_packed", "weight_scale", "weight_shape")
        return Kind("int4", "weight_packed", suffixes, False, weights["group_size"] if scheme[2] == "group" else None)
    if rounds and (inputs.get("type"), inputs.get("num_bits")) != (weights["type"], 8):
        return None
    if scheme == ("int", 8, "channel") and rounds:
        return Kind("int8", "weight_scale", ("weight", "weight_scale"), True)
    if scheme in (("float", 8, "channel"), ("float", 8, "tensor")):
        return Kind("fp8", "weight_scale", ("weight", "weight_scale"), rounds)
    return None


class StoredLayers:
    """Makes layers for serving from a folder's tensors, one at a time."""

    def __init__(self, files: Mapping[str, Tensor], kinds: Kinds, crossovers: Crossovers):
        self.files, self.kinds, self.crossovers = files, kinds, crossovers
        self.used: set[str] = set()
        """Names of the tensors that went into layers."""
        self._block = find_block()

    def quantised(self, name: str) -> bool:
        """Whether the layer of that name is stored quantised."""
        kind = self.kinds.of(name)
        stored = kind is not None and f"{name}.{kind.mark}" in self.files
        if stored and self.kinds.ignores(name):
            raise DataError(f"{name} is stored quantised, but config.json ignores it; export the model again")
        return stored

    def make(self, names: list[str]) -> Linear:
        """One layer for several over the same input, in the order of the names.

        DataError for a tensor that is missing, or stored otherwise than config.json says.
        """
        states = {self.quantised(name) for name in names}
        if len(states) == 2:
            raise DataError(
                f"{names[0]} and {names[-1]}: one is quantised and the other is not; export the model again"
            )
        if states == {False}:
            return Plain(torch.cat([self._read(f"{name}.weight").to(torch.bfloat16) for name in names]))
        kind, *others = dict.fromkeys(self.kinds.of(name) for name in names)
        if others:
            raise DataError(f"{names[0]} and {names[-1]}: {kind.name} and {others[0].name}; export the model again")
        parts = [{suffix: self._read(f"{name}.{suffix}") for suffix in kind.suffixes} for name in names]
        if kind.name == "int4":
            self._check_groups(names, kind, parts)
        layer = self._pack(kind, parts)
        self.crossovers.set(layer)
        return layer

    def _check_groups(self, names: list[str], kind: Kind, parts: list[dict[str, Tensor]]) -> None:
        for name, part in zip(names, parts, strict=True):
            columns, groups = part["weight_shape"][1].item(), part["weight_scale"].shape[1]
            if columns != groups * (kind.group_size or columns):
                said = kind.group_size or "a row"
                raise DataError(
                    f"{name}: scales for groups of {columns // groups}, config.json says {said}; export the model again"
                )

    def _read(self, name: str) -> Tensor:
        if name not in self.files:
            raise DataError(f"tensor {name} is missing; copy the folder again")
        self.used.add(name)
        return self.files[name]

    def _pack(self, kind: Kind, parts: list[dict[str, Tensor]]) -> Linear:
        if kind.name == "int8":
            return Int8.pack(parts)
        if kind.name == "fp8":
            return Fp8.pack(parts, rounds_inputs=kind.rounds_inputs)
        layer = Int4.pack(parts, self._block)
        if layer is None:
            groups = parts[0]["weight_shape"][1].item() // parts[0]["weight_scale"].shape[1]
            unpacked = PackedIntegers(Grid(bits=4, symmetric=True, group_size=groups))
            return Plain(torch.cat([unpacked.decompress(part) for part in parts]))
        return layer
