"""The feature losses of one student as modules: what they learn (projections, expert maps) trains in its engine.

    loss, sums_N = features.compare(shown, Lesson(taught, valid_BT, normalizer))

Shapes: B rows, T tokens a row, E and F experts of student and teacher, N feature losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from distill.losses.attention_relations import relation_divergence
from distill.losses.hidden_states import hidden_state_distance
from distill.losses.kernel import inverse
from distill.losses.router import router_divergence
from herd.run import comparisons
from teachers.recorder import Place

Pair = tuple[int, int]
"""A decoder layer of the student and the one of the teacher it is compared with."""

START_SPREAD = 0.1
"""Of a teacher expert's probability that a learned map spreads over all experts at first, so that each can grow."""


@dataclass(frozen=True)
class Lesson:
    """What the teacher showed on a micro-batch, which tokens count, and what their sums are divided by."""

    taught: dict[Place, torch.Tensor]
    valid_BT: torch.Tensor
    normalizer: torch.Tensor


class HiddenStates(nn.Module):
    """Distance of hidden states, through a projection of its own for every pair when widths differ."""

    kinds = ("hidden",)

    def __init__(self, settings: comparisons.HiddenFeature, pairs: list[Pair], widths: tuple[int, int]) -> None:
        super().__init__()
        self.settings, self.pairs = settings, pairs
        same = widths[0] == widths[1]
        self.projections = nn.ModuleList(nn.Identity() if same else _projection(*widths) for _ in pairs)

    def compare_pair(
        self, number: int, shown: list[torch.Tensor], taught: list[torch.Tensor], valid_BT: torch.Tensor
    ) -> torch.Tensor:
        """Sum over valid tokens of one pair's distance."""
        distance_BT = hidden_state_distance(self.projections[number](shown[0]), taught[0], self.settings.measure)
        return (distance_BT * valid_BT).sum()


class Relations(nn.Module):
    """Attention relations of queries, keys and values."""

    def __init__(self, settings: comparisons.RelationFeature, pairs: list[Pair]) -> None:
        super().__init__()
        self.settings, self.pairs, self.kinds = settings, pairs, tuple(settings.of)

    def compare_pair(
        self, number: int, shown: list[torch.Tensor], taught: list[torch.Tensor], valid_BT: torch.Tensor
    ) -> torch.Tensor:
        """Sum over valid tokens, and over queries, keys and values, of one pair's divergence."""
        heads = self.settings.heads
        return sum(relation_divergence(s, t, valid_BT, heads=heads) for s, t in zip(shown, taught, strict=True))


class Routers(nn.Module):
    """Divergence of routers, through a map from the teacher's experts to the student's."""

    kinds = ("router",)

    def __init__(self, settings: comparisons.RouterFeature, pairs: list[Pair], maps: list[torch.Tensor]) -> None:
        super().__init__()
        self.settings, self.pairs = settings, pairs
        self.maps = nn.ModuleList(MappedRouter(map_FE, learned=settings.learned) for map_FE in maps)

    def compare_pair(
        self, number: int, shown: list[torch.Tensor], taught: list[torch.Tensor], valid_BT: torch.Tensor
    ) -> torch.Tensor:
        """Sum over valid tokens of one pair's divergence."""
        student_TE, teacher_TF = shown[0].flatten(0, -2), taught[0].flatten(0, -2)
        return (self.maps[number](student_TE, teacher_TF) * valid_BT.flatten()).sum()


class MappedRouter(nn.Module):
    """Router divergence with its map: a constant, or the softmax of a parameter that starts near it."""

    def __init__(self, map_FE: torch.Tensor, *, learned: bool) -> None:
        super().__init__()
        self.learned = learned
        if learned:
            spread_FE = (1 - START_SPREAD) * map_FE + START_SPREAD / map_FE.shape[1]
            self.logits_FE = nn.Parameter(spread_FE.log())
        else:
            self.map_FE = map_FE  # no buffer: DeepSpeed would round it to bf16

    def forward(self, student_TE: torch.Tensor, teacher_TF: torch.Tensor) -> torch.Tensor:
        map_FE = self.logits_FE.float().softmax(1) if self.learned else self.map_FE.to(student_TE.device)
        return router_divergence(student_TE, teacher_TF, map_FE)


Part = HiddenStates | Relations | Routers


class FeatureLosses(nn.Module):
    """All feature losses of a student, in the order of the configuration. It is not called: its parts are."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        kinds = [part.settings.kind for part in parts]
        self.names = [
            kind if kinds[:place].count(kind) == 0 else f"{kind}_{kinds[:place].count(kind) + 1}"
            for place, kind in enumerate(kinds)
        ]

    def places(self, side: int) -> set[Place]:
        """What must be recorded of the student (side 0) or the teacher (side 1)."""
        return {(kind, pair[side]) for part in self.parts for pair in part.pairs for kind in part.kinds}

    def compare(self, shown: dict[Place, torch.Tensor], lesson: Lesson) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted sum of all, divided by the lesson's normaliser; and each one's sum over valid tokens [N]."""
        sums_N = torch.stack([self._mean_of_pairs(part, shown, lesson) for part in self.parts])
        weights_N = sums_N.new_tensor([part.settings.weight for part in self.parts])
        return sums_N @ weights_N * inverse(lesson.normalizer).to(sums_N.dtype), sums_N.detach()

    def _mean_of_pairs(self, part: Part, shown: dict[Place, torch.Tensor], lesson: Lesson) -> torch.Tensor:
        total = 0.0
        for number, (ours, theirs) in enumerate(part.pairs):
            mine = [shown[kind, ours] for kind in part.kinds]
            taught = [lesson.taught[kind, theirs] for kind in part.kinds]
            total = total + part.compare_pair(number, mine, taught, lesson.valid_BT)
        return total / len(part.pairs)


def _projection(student_width: int, teacher_width: int) -> nn.Linear:
    """Starts as a part of a rotation: it keeps angles, or as many as fit."""
    projection = nn.Linear(student_width, teacher_width, bias=False)
    nn.init.orthogonal_(projection.weight)
    return projection
