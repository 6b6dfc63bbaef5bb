"""Reads a cache whole and says what is wrong with it: `python -m teachers verify DIR`.

report = verify(path);  report.faults, report.rows
"""

from dataclasses import dataclass
from pathlib import Path

from herd.run.errors import DataError
from teachers.cache import shards
from teachers.cache.folder import shard_paths
from teachers.cache.manifest import Manifest
from teachers.cache.reader import Reader


@dataclass(frozen=True)
class Verification:
    """What was read, and every fault found, one line each."""

    rows: int
    records: int
    shards: int
    unsealed: int
    torn_bytes: int
    """Of records that killed writers did not finish; the next writer of the name cuts them off."""
    faults: list[str]


def verify(folder: Path) -> Verification:
    """Check every byte: starts, indices, digests of sealed shards, each record's checksums and its decoding.

    Raises DataError only when cache.json itself cannot be read.
    """
    manifest = Manifest.read(folder)
    paths, faults, opened = shard_paths(folder), [], []
    for path in paths:
        try:
            shard = shards.open_shard(path, manifest.digest)
            opened.append(shard)  # its records are read in any case: they know where the damage is
            if path.suffix == shards.SEALED:
                shards.verify_digest(shard)
        except DataError as fault:
            faults.append(str(fault))
    reader = Reader(folder, manifest, opened)
    for at in range(len(reader)):
        try:
            reader.kept(at)
        except DataError as fault:
            faults.append(str(fault))
    return Verification(
        rows=len(reader),
        records=sum(len(shard.entries) for shard in opened),
        shards=len(paths),
        unsealed=sum(path.suffix == shards.OPEN for path in paths),
        torn_bytes=sum(shard.torn for shard in opened),
        faults=faults,
    )
