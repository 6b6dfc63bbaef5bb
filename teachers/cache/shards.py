"""One shard file: records one after the other, then, once it is sealed, an index and a digest of everything.

NAME.part    being written, or left by a killed writer: whole records, at most one torn one at the end
NAME.bin     sealed; never changes again

shard = open_shard(path, cache_digest)      index of its records; raises DataError that names file and byte
"""

import hashlib
import mmap
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from herd.run.errors import DataError
from teachers.cache.records import CRC, END, HEADER_BYTES, Header

MAGIC = b"HERDSOFT"
START = struct.Struct("<8s16s36s")  # magic, digest of the cache, writer's name
START_BYTES = START.size + CRC.size
ENTRY = np.dtype([("key", "<i8"), ("place", "<u8"), ("step", "<u4")])
SEAL = b"SEALED\0\0"
DIGEST_BYTES = 32
FOOT = struct.Struct(f"<Q{DIGEST_BYTES}s{len(SEAL)}s")  # records, BLAKE2b of all bytes before, SEAL
FOOT_BYTES = FOOT.size + CRC.size
SEALED, OPEN = ".bin", ".part"


@dataclass(frozen=True)
class Shard:
    """A shard's bytes as a memory map, and where its records are."""

    path: Path
    buffer: memoryview
    entries: np.ndarray
    """ENTRY, in the order of the file."""
    end: int
    """Where the whole records end."""
    torn: int
    """Bytes of an unfinished record after them."""


def start_bytes(cache_digest: bytes, writer: str) -> bytes:
    """The first bytes of a shard."""
    raw = START.pack(MAGIC, cache_digest, writer.encode()[:36])
    return raw + CRC.pack(zlib.crc32(raw))


def end_bytes(entries: np.ndarray, digest: "hashlib.blake2b") -> bytes:
    """The last bytes of a sealed shard; `digest` has seen all bytes before."""
    index = CRC.pack(END) + entries.astype(ENTRY).tobytes()
    digest = digest.copy()
    digest.update(index)
    foot = FOOT.pack(len(entries), digest.digest(), SEAL)
    return index + foot + CRC.pack(zlib.crc32(foot, zlib.crc32(index)))


def new_digest() -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def open_shard(path: Path, cache_digest: bytes) -> Shard:
    """Map a shard and find its records. Raises DataError for a foreign or damaged one."""
    buffer = _map(path)
    _check_start(path, buffer, cache_digest)
    return _sealed(path, buffer) if path.suffix == SEALED else _scanned(path, buffer)


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)) if size else memoryview(b"")


def _check_start(path: Path, buffer: memoryview, cache_digest: bytes) -> None:
    raw = buffer[:START_BYTES]
    if len(raw) < START_BYTES:
        if path.suffix == OPEN:
            return  # its writer was killed before the first record
        raise damage(path, 0, "the file ends inside its first bytes")
    if zlib.crc32(raw[: START.size]) != CRC.unpack(raw[START.size :])[0]:
        raise damage(path, 0, "its first bytes fail their checksum")
    magic, digest, _ = START.unpack(raw[: START.size])
    if magic != MAGIC:
        raise damage(path, 0, "it is no shard of a cache")
    if digest != cache_digest:
        raise DataError(f"{path}: a shard of another cache (other teacher, data, codec or settings); take it out")


def _sealed(path: Path, buffer: memoryview) -> Shard:
    if len(buffer) < START_BYTES + FOOT_BYTES:
        raise damage(path, len(buffer), "the file was cut short")
    count, _, seal = FOOT.unpack(buffer[-FOOT_BYTES : -CRC.size])
    begin = len(buffer) - FOOT_BYTES - count * ENTRY.itemsize - CRC.size
    if seal != SEAL or begin < START_BYTES:
        raise damage(path, len(buffer), "the file was cut short, or its end is damaged")
    if zlib.crc32(buffer[begin : -CRC.size]) != CRC.unpack(buffer[-CRC.size :])[0]:
        raise damage(path, begin, "its index fails its checksum")
    entries = np.frombuffer(buffer[begin + CRC.size : -FOOT_BYTES], dtype=ENTRY)
    return Shard(path, buffer, entries, begin, 0)


def _scanned(path: Path, buffer: memoryview) -> Shard:
    """Records one by one; the last may be torn, anything else that is wrong is damage."""
    entries, place = [], START_BYTES
    while place + CRC.size <= len(buffer) and CRC.unpack(buffer[place : place + CRC.size])[0] != END:
        header = Header.read(buffer, place)
        if header is None:
            break
        if header.payload(buffer, place) is None:
            break
        entries.append((header.key, place, header.step))
        place += HEADER_BYTES + header.size
    end = min(place, len(buffer))
    if not _is_torn(buffer, end):
        raise damage(path, end, "a record fails its checksum")
    return Shard(path, buffer, np.array(entries, dtype=ENTRY), end, len(buffer) - end)


def _is_torn(buffer: memoryview, place: int) -> bool:
    """True when the bytes from here on are the beginning of something a killed writer had not finished.

    That is: nothing, a piece of a header, a whole header with a piece of its payload, an index (a writer that was
    sealing), or zeros that a file system put where a power cut left no data.
    """
    left = len(buffer) - place
    if left < HEADER_BYTES or CRC.unpack(buffer[place : place + CRC.size])[0] == END:
        return True
    header = Header.read(buffer, place)
    if header is None:
        return not any(buffer[place:])
    return left < HEADER_BYTES + header.size


def verify_digest(shard: Shard) -> None:
    """Read a sealed shard whole and compare its digest. Raises DataError."""
    digest = new_digest()
    digest.update(shard.buffer[:-FOOT_BYTES])
    if digest.digest() != FOOT.unpack(shard.buffer[-FOOT_BYTES : -CRC.size])[1]:
        raise damage(shard.path, 0, "its content does not have the digest it was sealed with")


def damage(path: Path, place: int, what: str) -> DataError:
    return DataError(
        f"{path} is damaged at byte {place:,}: {what}; delete that file, and make its rows again with the command that "
        f"python -m teachers inspect {path.parent} then ends with"
    )
