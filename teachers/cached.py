"""A teacher that is read from a cache: no forward, and any number of students.

    teacher = CachedTeacher(reader, missing="refuse")
    targets = teacher.targets_of(batch)                       # SparseTargets over B*T tokens

Rows that lack a target are refused, learnt from their labels alone, or given one by the live teacher, once.
"""

from typing import Literal

import torch

from herd.data.batches import Batch
from teachers import cache
from teachers.cache import Reader, Writer
from teachers.frozen import FrozenTeacher
from teachers.targets import FullTargets, SparseTargets, Tail

Missing = Literal["refuse", "hard", "forward"]


class CachedTeacher:
    """`live` and `writer` are what `forward` needs: they complete the cache as training meets rows without a target."""

    def __init__(
        self, reader: Reader, *, missing: Missing, live: FrozenTeacher | None = None, writer: Writer | None = None
    ) -> None:
        self._reader, self._missing, self._live, self._writer = reader, missing, live, writer
        self._completed: set[int] = set()

    @property
    def tail(self) -> Tail:
        """What its targets say of the classes they do not list."""
        return self._reader.tail

    def targets_of(self, batch: Batch) -> SparseTargets:
        """Targets of the tokens that follow each of these, flattened to B*T.

        Raises DataError for rows without a target (`refuse`), rows of other tokens, and damaged bytes.
        """
        if self._missing == "forward":
            self._complete(batch)
        return self._reader.targets(
            batch.keys_B, batch.input_ids_BT, allow_missing=self._missing == "hard", device=batch.labels_BT.device
        )

    def prefetch(self, batch: Batch) -> None:
        """Begin to read what `targets_of` will be asked for."""
        if self._missing != "forward":
            self._reader.prefetch(batch.keys_B, batch.input_ids_BT, allow_missing=self._missing == "hard")

    def close(self) -> None:
        """End the reader's thread and seal what was completed."""
        self._reader.close()
        if self._writer is not None:
            self._writer.close()

    def flush(self) -> None:
        """Make the targets it has made so far survive a power cut."""
        if self._writer is not None:
            self._writer.flush()

    def _complete(self, batch: Batch) -> None:
        missing_B = self._reader.missing(batch.keys_B)
        if not missing_B.any():
            return
        new_B = missing_B & torch.tensor([key not in self._completed for key in batch.keys_B.tolist()])
        if new_B.any():
            ids_BT, keys_B = batch.input_ids_BT[new_B], batch.keys_B[new_B]
            # Beside rows of a teacher that trained meanwhile, these must not look older.
            step = int(self._reader.steps_N.max(initial=0))
            self._writer.append(self._live.targets(ids_BT), keys_B, ids_BT, batch.labels_BT[new_B], step=step)
            self._completed |= set(keys_B.tolist())
        folder = self._reader.folder
        self._reader.close()
        self._reader = cache.open(folder, expecting=None)  # a reader is a snapshot


class WriteThrough:
    """Keeps the targets a running teacher makes anyway: its forward is paid for, only their encoding is not.

    A teacher that trains renews a row each time it meets it; one that stands still writes it once.
    """

    def __init__(self, made: cache.Cache, writer: Writer, *, trains: bool) -> None:
        self._writer, self._trains = writer, trains
        reader = cache.open(made.folder, expecting=None)
        self._kept = set() if trains else set(reader.keys_N.tolist())

    def keep(self, targets: FullTargets, batch: Batch, *, step: int) -> None:
        """Store the targets of these rows, made at the teacher's optimiser step `step`."""
        keys = set(batch.keys_B.tolist())
        if self._trains or not keys <= self._kept:
            step = step if self._trains else 0
            self._writer.append(targets, batch.keys_B, batch.input_ids_BT, batch.labels_BT, step=step)
            self._kept |= set() if self._trains else keys

    def flush(self) -> None:
        """Make what was written so far survive a power cut."""
        self._writer.flush()

    def close(self) -> None:
        """Seal what was written."""
        self._writer.close()
