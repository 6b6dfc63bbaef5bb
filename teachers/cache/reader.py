"""Reads rows of a cache by key from memory maps, checking each record before it may teach.

    reader = cache.open(path, expecting=Identity(...))
    reader.missing(keys_B)                                      which rows have no target
    targets = reader.targets(keys_B, input_ids_BT)              SparseTargets over B * T tokens
    reader.prefetch(next_keys_B, next_input_ids_BT)             decoded by a thread meanwhile

Suffix legend: B rows, T tokens a row, K classes of a token, N entries of the index.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from herd.run.errors import DataError
from teachers.cache import shards
from teachers.cache.codecs import Kept, parse
from teachers.cache.codecs.densify import moved, sparse_targets
from teachers.cache.manifest import Manifest
from teachers.cache.records import Header, hash_rows
from teachers.cache.shards import Shard
from teachers.targets import SparseTargets

FOUND = np.dtype([("key", "<i8"), ("step", "<i8"), ("shard", "<i4"), ("place", "<i8")])


class Reader:
    """A snapshot of the cache when it was opened; any number of readers at once, writers too."""

    def __init__(self, folder: Path, manifest: Manifest, opened: list[Shard], *, oldest_step: int = 0) -> None:
        self.folder, self.manifest = folder, manifest
        self._shards = opened
        self._index_N = index_of(opened, oldest_step=oldest_step)
        self._ahead: dict[tuple[int, ...], Future[SparseTargets]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self.tail = parse(manifest.codec).tail

    def __len__(self) -> int:
        """Rows that have a target."""
        return len(self._index_N)

    @property
    def keys_N(self) -> np.ndarray:
        """Their keys, int64, sorted."""
        return self._index_N["key"]

    @property
    def steps_N(self) -> np.ndarray:
        """The teacher's optimiser step of each."""
        return self._index_N["step"]

    def missing(self, keys_B: torch.Tensor) -> torch.Tensor:
        """bool [B]: True for rows without a target."""
        return torch.from_numpy(self._find(keys_B.numpy()) < 0)

    def targets(
        self,
        keys_B: torch.Tensor,
        input_ids_BT: torch.Tensor,
        *,
        allow_missing: bool = False,
        device: torch.device | str = "cpu",
    ) -> SparseTargets:
        """Targets of these rows, flattened in this order; `present_T` is False where a row has none and may.

        Raises DataError for rows without a target (their number, and the command that makes them), for a row whose
        tokens are not those its target was made from, and for damaged bytes.
        """
        ahead = self._ahead.pop(_names(keys_B, allow_missing), None)
        found = ahead.result() if ahead else self._read(keys_B, input_ids_BT, allow_missing)
        return moved(found, device)

    def prefetch(self, keys_B: torch.Tensor, input_ids_BT: torch.Tensor, *, allow_missing: bool = False) -> None:
        """Begin to read and decode what `targets` will be asked for with the same arguments."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="soft-targets")
        job = self._thread.submit(self._read, keys_B, input_ids_BT, allow_missing)
        self._ahead[_names(keys_B, allow_missing)] = job

    def close(self) -> None:
        """End the thread. The maps go with the last target read from them."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _read(self, keys_B: torch.Tensor, input_ids_BT: torch.Tensor, allow_missing: bool) -> SparseTargets:
        length = self.manifest.identity.sequence_length
        if input_ids_BT.shape[1] != length:
            raise DataError(f"cache {self.folder}: its rows have {length} tokens, these {input_ids_BT.shape[1]}")
        at_B = self._find(keys_B.numpy())
        if not allow_missing and (at_B < 0).any():
            raise DataError(self._missing_line(keys_B, at_B < 0))
        hashes = hash_rows(input_ids_BT)
        rows = [None if at < 0 else self.kept(int(at), row_hash) for at, row_hash in zip(at_B, hashes, strict=True)]
        return sparse_targets(rows, length, tail=self.tail, temperature=self.manifest.identity.temperature)

    def kept(self, at: int, row_hash: int | None = None) -> Kept:
        """The row at a place of the index, checked; with `row_hash` that of its tokens too."""
        identity = self.manifest.identity
        payload = self.payload(at, row_hash)
        return Kept.from_bytes(payload, num_tokens=identity.sequence_length, vocabulary=identity.vocabulary)

    def payload(self, at: int, row_hash: int | None = None) -> memoryview:
        """Its bytes as they were encoded, checked in the same way."""
        key, _, number, place = self._index_N[at].tolist()
        shard = self._shards[number]
        header = Header.read(shard.buffer, place)
        payload = None if header is None else header.payload(shard.buffer, place)
        if payload is None or header.key != key:
            raise shards.damage(shard.path, place, f"the record of row {key} fails its checksum")
        if row_hash is not None and header.row_hash != row_hash:
            raise DataError(
                f"cache {self.folder}: row {key} was made from other tokens than this run has under that key: the rows "
                "are packed or cut differently; make a cache of this data with this tokenizer"
            )
        return payload

    def _find(self, keys_B: np.ndarray) -> np.ndarray:
        """Places in the index [B], -1 where a key is not in it."""
        if not len(self):
            return np.full(len(keys_B), -1)
        at_B = np.searchsorted(self.keys_N, keys_B).clip(max=len(self) - 1)
        return np.where(self.keys_N[at_B] == keys_B, at_B, -1)

    def _missing_line(self, keys_B: torch.Tensor, missing_B: np.ndarray) -> str:
        first = int(keys_B[int(np.flatnonzero(missing_B)[0])])
        command = self.manifest.completing_command(self.folder)
        return (
            f"cache {self.folder}: {int(missing_B.sum())} of the {len(missing_B)} rows asked for have no target "
            f"(first key {first}; the cache has {len(self):,} rows); make them with: {command}"
        )


def index_of(opened: list[Shard], *, oldest_step: int = 0) -> np.ndarray:
    """FOUND [N] sorted by key; of several records of a row the one with the latest step, then the latest written."""
    parts = []
    for number, shard in enumerate(opened):
        part = np.empty(len(shard.entries), dtype=FOUND)
        part["key"], part["step"], part["place"] = (shard.entries[name] for name in ("key", "step", "place"))
        part["shard"] = number
        parts.append(part[part["step"] >= oldest_step])
    every = np.concatenate(parts) if parts else np.empty(0, dtype=FOUND)
    every = every[np.lexsort((every["place"], every["shard"], every["step"], every["key"]))]
    last = np.ones(len(every), dtype=bool)
    last[:-1] = every["key"][1:] != every["key"][:-1]
    return every[last]


def _names(keys_B: torch.Tensor, allow_missing: bool) -> tuple[int, ...]:
    return (int(allow_missing), *keys_B.tolist())
