"""Several teachers, one for each source of the data: every one runs, or is read, on its own rows only.

    teacher = RoutedTeacher({0: Route("web", FrozenTeacher(model)), 2: Route("code", FrozenTeacher(other))})
    targets = teacher.targets_of(batch)            # over B*T tokens; rows of source 1 have none

Shapes: B rows, T tokens of all rows, K classes kept of a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from herd.data.batches import Batch
from teachers.cached import CachedTeacher, WriteThrough
from teachers.frozen import FrozenTeacher
from teachers.targets import FullTargets, RoutedTargets, SparseTargets


@dataclass(frozen=True)
class Route:
    """The teacher of one source."""

    source: str
    teacher: FrozenTeacher | CachedTeacher
    writing: WriteThrough | None = None
    """Keeps the targets a frozen teacher makes."""


class RoutedTeacher:
    """`routes`: places in `data.sources` to their teachers, all frozen or all cached with one kind of tail."""

    def __init__(self, routes: Mapping[int, Route]) -> None:
        self.routes = routes

    def frozen(self, number: int) -> FrozenTeacher | None:
        """The teacher of a source, if it has one that runs."""
        route = self.routes.get(number)
        return route.teacher if route is not None and isinstance(route.teacher, FrozenTeacher) else None

    def targets_of(self, batch: Batch) -> RoutedTargets | SparseTargets:
        """Targets of the tokens that follow each of these, flattened to B*T. Raises DataError as a cache does."""
        parts = {number: self._targets(route, own) for number, (route, own) in self._split(batch).items()}
        if any(isinstance(part, SparseTargets) for part in parts.values()):
            return join(parts, batch)
        places = list(parts)
        part_B = tuple(places.index(number) if number in parts else None for number in batch.sources_B.tolist())
        present_B = torch.tensor([part is not None for part in part_B], device=batch.labels_BT.device)
        return RoutedTargets(tuple(parts.values()), part_B, present_B.repeat_interleave(batch.labels_BT.shape[1]))

    def prefetch(self, batch: Batch) -> None:
        """Begin to read what `targets_of` will be asked for."""
        for route, own in self._split(batch).values():
            if isinstance(route.teacher, CachedTeacher):
                route.teacher.prefetch(own)

    def flush(self) -> None:
        """Make what was written so far survive a power cut."""
        for part in self._caches():
            part.flush()

    def close(self) -> None:
        """Seal what was written and end what reads."""
        for part in self._caches():
            part.close()

    def _caches(self) -> list[CachedTeacher | WriteThrough]:
        parts = [part for route in self.routes.values() for part in (route.teacher, route.writing)]
        return [part for part in parts if isinstance(part, CachedTeacher | WriteThrough)]

    def _split(self, batch: Batch) -> dict[int, tuple[Route, Batch]]:
        """The routed rows of a batch by source; nothing for a source it has no row of."""
        there = set(batch.sources_B.tolist())
        return {number: (route, batch.of_source(number)) for number, route in self.routes.items() if number in there}

    def _targets(self, route: Route, own: Batch) -> FullTargets | SparseTargets:
        if isinstance(route.teacher, CachedTeacher):
            return route.teacher.targets_of(own)
        targets = route.teacher.targets(own.input_ids_BT)
        if route.writing is not None:
            route.writing.keep(targets, own, step=0)
        return targets


def join(parts: Mapping[int, SparseTargets], batch: Batch) -> SparseTargets:
    """Sparse targets of the rows of several sources as those of the batch; rows of other sources have none."""
    first, total = next(iter(parts.values())), batch.labels_BT.numel()
    width = max(part.ids_TK.shape[1] for part in parts.values())
    ids_TK, probs_TK = first.ids_TK.new_full((total, width), -1), first.probs_TK.new_zeros(total, width)
    entropy_T, ce_T = first.entropy_T.new_zeros(total), first.ce_T.new_zeros(total)
    present_T = torch.zeros(total, dtype=torch.bool, device=ids_TK.device)
    for number, part in parts.items():
        own_B = (batch.sources_B == number).to(ids_TK.device)
        (own_T,) = own_B.repeat_interleave(batch.labels_BT.shape[1]).nonzero(as_tuple=True)
        ids_TK[own_T, : part.ids_TK.shape[1]], probs_TK[own_T, : part.ids_TK.shape[1]] = part.ids_TK, part.probs_TK
        entropy_T[own_T], ce_T[own_T] = part.entropy_T, part.ce_T
        present_T[own_T] = True if part.present_T is None else part.present_T
    return SparseTargets(ids_TK, probs_TK, first.tail, entropy_T, ce_T, first.temperature, present_T)
