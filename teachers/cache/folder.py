"""A cache's folder: cache.json beside shards `WRITER.NUMBER.bin` (sealed) and `.part` (not yet), and locks.

cache = create(path, identity, "head_and_tail=16");  writer = cache.writer("rank0")
reader = open(path, expecting=identity)
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from herd.run.errors import DataError
from teachers.cache import shards
from teachers.cache.codecs import parse
from teachers.cache.codecs.encoding import check_vocabulary
from teachers.cache.identity import FIXED, MENDS, Identity, check
from teachers.cache.manifest import FILE, Manifest
from teachers.cache.reader import Reader
from teachers.cache.writer import SHARD_BYTES, Writer


@dataclass(frozen=True)
class Cache:
    """A folder that can be written."""

    folder: Path
    manifest: Manifest

    def writer(self, name: str = "rank0", *, shard_bytes: int = SHARD_BYTES) -> Writer:
        """The writer of that name, one a process. Raises EnvironmentFault while another process has it."""
        return Writer(self.folder, self.manifest, name, shard_bytes=shard_bytes)


def create(
    folder: Path,
    identity: Identity,
    codec: str,
    *,
    seed: int = 0,
    facts: Mapping[str, Any] = {},
    more_data: bool = False,
) -> Cache:
    """Make a cache, or go on with the one in `folder` if it is of the same identity, codec and seed.

    `more_data`: rows of another corpus may join those that are there. `facts` (of `cache.facts`) say what the command
    must name that makes missing rows. Raises ConfigError for a codec that does not fit, DataError for a folder of
    another identity.
    """
    folder = Path(folder)
    missing = [name for name, value in asdict(identity).items() if value is None]
    assert not missing, f"a cache needs a whole identity; {missing} not given"
    check_vocabulary(parse(codec), identity.vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "cache.lock"):
        if not (folder / FILE).exists():
            if any(folder.glob(f"*{shards.SEALED}")) or any(folder.glob(f"*{shards.OPEN}")):
                raise DataError(
                    f"cache {folder}: has shards but no {FILE}; restore it from a copy, or empty the folder"
                )
            manifest = Manifest(identity, codec, seed, [identity.data], dict(facts))
        else:
            manifest = _reopened(folder, identity, codec, seed, more_data)
        manifest.write(folder)
    return Cache(folder, manifest)


def _reopened(folder: Path, identity: Identity, codec: str, seed: int, more_data: bool) -> Manifest:
    manifest = Manifest.read(folder)
    theirs = asdict(manifest.identity) | {"codec": manifest.codec, "seed": manifest.seed}
    ours = asdict(identity) | {"codec": codec, "seed": seed}
    for name in (*FIXED, "codec", "seed"):
        if theirs[name] != ours[name]:
            mend = MENDS.get(name, "one cache has one of it: repeat that, or write another folder")
            raise DataError(f"cache {folder}: {name} is {theirs[name]} in the cache, {ours[name]} in this run; {mend}")
    if identity.data not in manifest.data and not more_data:
        check(folder, manifest.identity, manifest.data, identity)
    return manifest.with_data(identity.data)


def open(folder: Path, *, expecting: Identity | None, oldest_step: int = 0) -> Reader:
    """A reader, after every check that needs no payload. None: whatever it is of (to look at it, not to train).

    Rows that a teacher made before its step `oldest_step` count as missing. Raises DataError for a cache that is of
    something else (the field and both values), for a foreign shard and for damage.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if expecting is not None:
        check(folder, manifest.identity, manifest.data, expecting)
    return Reader(folder, manifest, open_shards(folder, manifest), oldest_step=oldest_step)


def open_shards(folder: Path, manifest: Manifest) -> list[shards.Shard]:
    """All shards in the order of their names. Raises DataError for the first that is foreign or damaged."""
    opened = []
    for path in shard_paths(folder):
        if not path.exists():  # its writer sealed it since the folder was listed
            path = path.with_suffix(shards.SEALED)
        opened.append(shards.open_shard(path, manifest.digest))
    return opened


def shard_paths(folder: Path) -> list[Path]:
    """Sealed and unsealed shards by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in (shards.SEALED, shards.OPEN))
