"""What is to be allocated: groups of layers that servers merge, the choices, and what each choice costs. No weights.

problem = make_problem("runs/nano/students/scout", ["int4-g64", "fp8", "bf16"])
problem.bytes_of(allocation), problem.active_of(allocation)          # allocation: group -> label
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from herd.run.errors import ConfigError
from quant.allocations import group_layers, labelled
from quant.architectures import EXPERT_BANK
from quant.formats.format import Header
from quant.plans import Plan, header_bytes, make_plan
from quant.schemes import Scheme
from quant.sources import Source, open_source

Allocation = Mapping[str, str]
ANY = Scheme.named("int8")  # which takes layers of any shape: its plan says which layers may be quantised at all


@dataclass(frozen=True)
class Group:
    """Layers that have one scheme, because servers merge them."""

    name: str
    layers: tuple[str, ...]
    weights: int
    bytes: dict[str, int]
    """Label -> bytes stored."""
    experts: int
    """1 where there are none."""
    reading: int
    """Experts a token reads."""

    def active(self, label: str) -> int:
        """Bytes that a token reads."""
        return self.bytes[label] * self.reading // self.experts

    @property
    def active_weights(self) -> int:
        return self.weights * self.reading // self.experts


@dataclass(frozen=True)
class Problem:
    groups: tuple[Group, ...]
    labels: tuple[str, ...]
    fixed_bytes: int
    """Of what is never quantised: embeddings, norms, the head, ..."""
    vocabulary: int
    source: Source = field(repr=False)
    plans: dict[str, Plan] = field(repr=False)
    """Label -> the plan that gives it to every group; none for bf16."""

    @property
    def weights(self) -> int:
        return sum(group.weights for group in self.groups)

    @property
    def active_weights(self) -> int:
        return sum(group.active_weights for group in self.groups)

    def bytes_of(self, allocation: Allocation) -> int:
        """Bytes the groups are stored in; with `fixed_bytes`, all tensors of the export."""
        return sum(group.bytes[allocation[group.name]] for group in self.groups)

    def active_of(self, allocation: Allocation) -> int:
        """Bytes of the groups that one token reads: of an expert bank, its own expert."""
        return sum(group.active(allocation[group.name]) for group in self.groups)

    def bits_of(self, allocation: Allocation) -> float:
        """Bits per weight of the groups, scales included."""
        return 8 * self.bytes_of(allocation) / self.weights

    def active_bits_of(self, allocation: Allocation) -> float:
        """The same over what one token reads."""
        return 8 * self.active_of(allocation) / self.active_weights

    def uniform(self, label: str) -> dict[str, str]:
        """The same choice for every group."""
        return {group.name: label for group in self.groups}


def make_problem(folder: str | Path, labels: Sequence[str], *, leave_out: bool = False) -> Problem:
    """The groups of a model folder; ConfigError for an unknown label, or for one that does not fit a layer.

    leave_out: do without those that do not fit.
    """
    schemes = {label: labelled(label) for label in dict.fromkeys(labels)}
    if len(schemes) < 2:
        raise ConfigError(f"--choices {' '.join(labels)}: give two different ones at least")
    source = open_source(folder)
    plain = make_plan(source, ANY)
    plans = {}
    for label, scheme in [*schemes.items()]:
        try:
            if scheme is not None:
                plans[label] = make_plan(source, scheme)
        except ConfigError as error:
            if not leave_out:
                fault = str(error).partition("; use ")[0]
                raise ConfigError(f"--choices {label}: {fault}; leave it out") from None
            del schemes[label]
    shapes = {layer.name: layer.shape for layer in plain.layers}
    text = plain.config.get_text_config()
    groups = []
    for name, layers in group_layers(shapes).items():
        bank = EXPERT_BANK.match(layers[0]) is not None
        sizes = {
            label: sum(_layer_bytes(scheme, shapes[layer]) for layer in layers) for label, scheme in schemes.items()
        }
        experts = len(layers) // 3 if bank else 1
        reading = getattr(text, "num_experts_per_tok", 1) if bank else 1
        weights = sum(prod(shapes[layer]) for layer in layers)
        groups.append(Group(name, tuple(layers), weights, sizes, experts, reading))
    fixed = sum(header_bytes(header) for header in plain.kept.values())
    return Problem(tuple(groups), tuple(schemes), fixed, text.vocab_size, source, plans)


def _layer_bytes(scheme: Scheme | None, shape: tuple[int, int]) -> int:
    if scheme is None:
        return 2 * prod(shape)
    headers: list[Header] = list(scheme.stored(shape).values())
    return sum(map(header_bytes, headers))
