"""Appends rows to a cache: every writer has shards of its own, so any number of processes write at once.

    with cache.create(path, identity, codec).writer("rank0") as writer:
        writer.append(targets, keys_B, input_ids_BT, labels_BT, step=120)

A row is there once its record is whole in the file: killed at any moment, a writer loses no earlier row, and the next
one of its name cuts off what was torn. Suffix legend: B rows, T tokens a row.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from filelock import FileLock, Timeout

from herd.run import files
from herd.run.errors import ConfigError, DataError, EnvironmentFault
from teachers.cache import shards
from teachers.cache.codecs import encode_rows, parse
from teachers.cache.manifest import Manifest
from teachers.cache.records import hash_rows, record_bytes
from teachers.targets import FullTargets

SHARD_BYTES = 256 << 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,35}")


class Writer:
    """The only process that writes under its name. Use it in `with`, or `close` it: that seals the shard."""

    def __init__(self, folder: Path, manifest: Manifest, name: str, *, shard_bytes: int = SHARD_BYTES) -> None:
        if not NAME.fullmatch(name):
            raise ConfigError(f"writer {name!r}: must be letters, digits, _ and -, at most 36")
        self._folder, self._manifest, self._name, self._shard_bytes = folder, manifest, name, shard_bytes
        self._codec = parse(manifest.codec)
        self._lock = self._acquire()
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def append(
        self,
        targets: FullTargets,
        keys_B: torch.Tensor,
        input_ids_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        *,
        step: int,
    ) -> None:
        """Encode and store a teacher's targets over B * T tokens, made at its optimiser step `step` (0: it is still).

        Raises DataError for rows or logits of another size than the cache's, NumericalError (with the row) for NaN.
        """
        identity = self._manifest.identity
        if input_ids_BT.shape[1] != identity.sequence_length:
            raise DataError(
                f"cache {self._folder}: sequence_length is {identity.sequence_length} in the cache, "
                f"{input_ids_BT.shape[1]} in these rows"
            )
        payloads = encode_rows(
            self._codec,
            targets,
            labels_BT,
            keys_B,
            vocabulary=identity.vocabulary,
            temperature=identity.temperature,
            seed=self._manifest.seed,
        )
        self.store(keys_B, input_ids_BT, payloads, step=step)

    def store(self, keys_B: torch.Tensor, input_ids_BT: torch.Tensor, payloads: Sequence[bytes], *, step: int) -> None:
        """Add rows that are encoded already.

        A row that is there gets another record; readers take the one with the later step. Raises EnvironmentFault
        when the disk is full: nothing of the torn record is left, and earlier rows are safe.
        """
        for key, row_hash, payload in zip(keys_B.tolist(), hash_rows(input_ids_BT), payloads, strict=True):
            record = record_bytes(payload, key=key, row_hash=row_hash, step=step)
            if self._end + len(record) > self._shard_bytes and self._entries:
                self._seal()
                self._open()
            self._write(record)
            self._entries.append((key, self._end - len(record), step))

    def flush(self) -> None:
        """Make everything appended so far survive a power cut (a killed process loses nothing without)."""
        os.fsync(self._file)

    def close(self) -> None:
        """Seal the shard and let others write under this name. Without rows nothing is left behind."""
        if self._file >= 0:
            self._seal()
            self._lock.release()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # the next writer of this name goes on from here
            self._release()

    def _acquire(self) -> FileLock:
        lock = FileLock(self._folder / f"{self._name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise EnvironmentFault(
                f"cache {self._folder}: another process is writing as {self._name!r} (it holds {self._name}.lock); "
                "wait for it to end, or give this writer another name"
            ) from None
        return lock

    def _open(self) -> None:
        """Go on with this writer's unsealed shard, cutting off a torn record, or begin the next."""
        self._digest, self._entries, self._end = shards.new_digest(), [], 0
        unsealed = sorted(self._folder.glob(f"{self._name}.[0-9]*{shards.OPEN}"))
        self._path = unsealed[0] if unsealed else self._next_path()
        with files.disk_faults(self._path):
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            if unsealed:
                self._recover()
            if self._end == 0:
                os.ftruncate(self._file, 0)
                self._write(shards.start_bytes(self._manifest.digest, self._name))

    def _next_path(self) -> Path:
        sealed = self._folder.glob(f"{self._name}.[0-9]*{shards.SEALED}")
        number = max((int(path.name.split(".")[1]) for path in sealed), default=-1) + 1
        return self._folder / f"{self._name}.{number:05d}{shards.OPEN}"

    def _recover(self) -> None:
        shard = shards.open_shard(self._path, self._manifest.digest)
        if shard.end < shards.START_BYTES:
            return
        self._digest.update(shard.buffer[: shard.end])
        self._entries = [tuple(entry) for entry in shard.entries.tolist()]
        self._end = shard.end
        os.ftruncate(self._file, self._end)

    def _write(self, data: bytes) -> None:
        """Append in one call; a short write is taken back."""
        try:
            with files.disk_faults(self._path):
                done = 0
                while done < len(data):
                    done += os.pwrite(self._file, data[done:], self._end + done)
        except BaseException:
            os.ftruncate(self._file, self._end)
            raise
        self._digest.update(data)
        self._end += len(data)

    def _seal(self) -> None:
        """Add the index and the digest, flush, and give the file its final name."""
        if not self._entries:
            os.close(self._file)
            self._path.unlink()
        else:
            self._write(shards.end_bytes(np.array(self._entries, dtype=shards.ENTRY), self._digest))
            os.fsync(self._file)
            os.close(self._file)
            os.rename(self._path, self._path.with_suffix(shards.SEALED))
        self._file = -1
        files.sync_folder(self._folder)

    def _release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._lock.release()
