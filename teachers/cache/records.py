"""A record of a shard: one row's targets behind a header that guards itself and the payload.

    data = record_bytes(payload, key=key, row_hash=row_hash, step=step)
    header = Header.read(buffer, place);  header.payload(buffer, place)

Header, 32 bytes, little-endian: payload bytes u32, teacher step u32, key i64, row hash u64, CRC-32 of the payload
u32, CRC-32 of the 28 bytes before u32.
"""

import hashlib
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch

HEADER = struct.Struct("<IIqQI")
CRC = struct.Struct("<I")
HEADER_BYTES = HEADER.size + CRC.size
END = 0xFFFFFFFF
"""In place of the payload's length: no more records, the index follows."""


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before a payload."""

    size: int
    step: int
    key: int
    row_hash: int
    crc: int

    @classmethod
    def read(cls, buffer: memoryview, place: int) -> "Header | None":
        """None when the bytes there fail their own checksum."""
        raw = buffer[place : place + HEADER_BYTES]
        if len(raw) < HEADER_BYTES or zlib.crc32(raw[: HEADER.size]) != CRC.unpack(raw[HEADER.size :])[0]:
            return None
        return cls(*HEADER.unpack(raw[: HEADER.size]))

    def payload(self, buffer: memoryview, place: int) -> memoryview | None:
        """The bytes after a header at `place`; None when they fail their checksum or are not all there."""
        raw = buffer[place + HEADER_BYTES : place + HEADER_BYTES + self.size]
        return raw if len(raw) == self.size and zlib.crc32(raw) == self.crc else None


def record_bytes(payload: bytes, *, key: int, row_hash: int, step: int) -> bytes:
    """A whole record."""
    header = HEADER.pack(len(payload), step, key, row_hash, zlib.crc32(payload))
    return header + CRC.pack(zlib.crc32(header)) + payload


def hash_rows(input_ids_BT: torch.Tensor) -> list[int]:
    """64 bits of BLAKE2b over each row's tokens: rows packed otherwise, or by another tokenizer, differ."""
    rows_BT = np.ascontiguousarray(input_ids_BT.cpu().numpy().astype("<u4"))
    return [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in rows_BT]
