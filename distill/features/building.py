"""From the configuration to the feature losses of one student: layers paired, widths and experts looked up and checked.

features = build_features(config.loss.features, student, teacher, name="scout", seed=0)       # None without any
"""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from distill.features.losses import FeatureLosses, HiddenStates, Pair, Part, Relations, Routers
from distill.losses.router import even_expert_map, listed_expert_map
from herd.run import comparisons
from herd.run.errors import ConfigError
from teachers.recorder import Source, places_of


def build_features(
    settings: Sequence[comparisons.Feature], student: PreTrainedModel, teacher: PreTrainedModel, *, name: str, seed: int
) -> FeatureLosses | None:
    """The configured losses for the student called `name`; None if there are none.

    Projections depend on the seed alone. Raises ConfigError naming the model that lacks a layer, a projection of its
    attention, or a router.
    """
    mine = [(place, one) for place, one in enumerate(settings) if one.students is None or name in one.students]
    if not mine:
        return None
    sides = _Side(name, student), _Side("teacher", teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FeatureLosses([_build(one, f"loss.features.{place}", *sides) for place, one in mine])


class _Side:
    """One of the two models, asked for its places."""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name, self.type, self.dtype = name, model.config.model_type, model.dtype
        self.width = model.config.get_text_config().hidden_size
        self._places = places_of(model)

    def layers(self, kind: str) -> list[int]:
        """Decoder layers that have this place, in order; may be none."""
        return [layer for found, layer in self._places if found == kind]

    def source(self, field: str, kind: str, layer: int) -> Source:
        if (kind, layer) in self._places:
            return self._places[kind, layer]
        what = {"hidden": "layer", "router": "router"}.get(kind, f"{kind}_proj of its own")
        have = self.layers(kind)
        there = f"it has them in layers {_listed(have)}" if have else "none of its layers has"
        if kind == "hidden":
            there = f"its layers are 0 to {have[-1]}" if have else "its layers were not found"
        raise ConfigError(f"{field}: {self.name} ({self.type}) has no {what} in layer {layer}: {there}")


def _build(settings: comparisons.Feature, field: str, student: _Side, teacher: _Side) -> Part:
    kinds = {"hidden": ["hidden"], "router": ["router"]}.get(settings.kind) or settings.of
    pairs = settings.layers or list(_same_depth(field, kinds[0], student, teacher))
    sources = [
        [side.source(field, kind, pair[place]) for kind in kinds for place, side in enumerate((student, teacher))]
        for pair in pairs
    ]
    match settings:
        case comparisons.HiddenFeature():
            return HiddenStates(settings, pairs, (student.width, teacher.width)).to(student.dtype)
        case comparisons.RelationFeature():
            widths = {source.width for pair in sources for source in pair}
            uneven = sorted(width for width in widths if width % settings.heads)
            if uneven:
                raise ConfigError(
                    f"{field}.heads = {settings.heads}: must divide the widths of the projections compared, "
                    f"{_listed(sorted(widths))}"
                )
            return Relations(settings, pairs)
        case comparisons.RouterFeature():
            return Routers(
                settings, pairs, [_map(settings, field, ours.width, theirs.width) for ours, theirs in sources]
            )
    raise AssertionError(f"no feature loss for {settings!r}")


def _same_depth(field: str, kind: str, student: _Side, teacher: _Side) -> Iterator[Pair]:
    """Every layer of the student that has this, with the teacher's at the same share of the way up."""
    ours, theirs = (side.layers(kind) or [side.source(field, kind, 0)] for side in (student, teacher))
    for number, layer in enumerate(ours, start=1):
        yield layer, theirs[max(1, int(number * len(theirs) / len(ours) + 0.5)) - 1]


def _map(settings: comparisons.RouterFeature, field: str, student_experts: int, teacher_experts: int) -> torch.Tensor:
    if settings.experts is None:
        return even_expert_map(teacher_experts, student_experts)
    if len(settings.experts) != teacher_experts or max(settings.experts) >= student_experts:
        raise ConfigError(
            f"{field}.experts: must name one of the student's {student_experts} experts, counted from 0, for each of "
            f"the teacher's {teacher_experts}; it has {len(settings.experts)} entries up to {max(settings.experts)}"
        )
    return listed_expert_map(settings.experts, student_experts)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
