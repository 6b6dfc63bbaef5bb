"""Training rows of several sources, each with its own stream, mixed by weight.

    rows = MixedRows({"web": stream, "code": other}, [3.0, 1.0], seed=0)
    batches = rows.take(step, rows=8, micro_rows=2, rank=0, world=2)     # batch.sources_B: 0 for web, 1 for code

Suffix legend: R rows, B rows of a micro-batch, T tokens a row.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from herd.data.batches import Batch, check_same_rows, make_batch, places_of_rank
from herd.data.mixture import Mixture

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows uint32 [R, T + 1], keys and bytes int64 [R]."""


class Stream(Protocol):
    """The rows of one source in training order, by place."""

    def read(self, places: np.ndarray, kept: np.ndarray) -> Columns:
        """The rows at `places[kept]`; `places`, in order, are those of all ranks."""
        ...

    def tell_wrap(self, step: int, last: int, of: str = "") -> None:
        """Say, once, that the rows (`of` which source) have been read to their end, if place `last` is beyond it."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MixedRows:
    """A RowSource over the streams of several sources."""

    def __init__(self, streams: Mapping[str, Stream], weights: Sequence[float], *, seed: int) -> None:
        self._streams, self._seed = streams, seed
        self._mixture = Mixture(weights, seed=seed)

    def take(self, step: int, *, rows: int, micro_rows: int, rank: int, world: int) -> list[Batch]:
        """See `RowSource.take`."""
        own_R = np.concatenate(places_of_rank(rows, micro_rows=micro_rows, rank=rank, world=world))
        slot = np.full(rows, -1)
        slot[own_R] = np.arange(len(own_R))
        source, place = self._mixture.at(np.arange(step * rows, (step + 1) * rows))
        found: list[tuple[np.ndarray, Columns]] = []
        for number, (name, stream) in enumerate(self._streams.items()):
            (of_step,) = np.nonzero(source == number)
            if not len(of_step):
                continue
            (kept,) = np.nonzero(slot[of_step] >= 0)
            found.append((slot[of_step[kept]], stream.read(place[of_step], kept)))
            if rank == 0:
                stream.tell_wrap(step, int(place[of_step[-1]]), of=f" of {name}")
        back_R = np.argsort(np.concatenate([slots for slots, _ in found]))
        columns = zip(*(columns for _, columns in found), strict=True)
        rows_RT1, keys_R, bytes_R = (np.concatenate(column)[back_R] for column in columns)
        cuts = [slice(at, at + micro_rows) for at in range(0, len(own_R), micro_rows)]
        return [make_batch(rows_RT1[cut], keys_R[cut], bytes_R[cut], source[own_R][cut]) for cut in cuts]

    def state_dict(self) -> dict[str, Any]:
        """See `RowSource.state_dict`."""
        states = {name: stream.state_dict() for name, stream in self._streams.items()}
        facts = [f"{name} {state['rows']}" for name, state in states.items()]
        digest = hashlib.sha256("\n".join([*facts, f"{self._mixture.counts_S.tolist()}"]).encode())
        return {"rows": digest.hexdigest()[:32], "seed": self._seed, "sources": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `RowSource.load_state_dict`."""
        check_same_rows(state, self.state_dict())
        for name, stream in self._streams.items():
            stream.load_state_dict(state["sources"][name])
