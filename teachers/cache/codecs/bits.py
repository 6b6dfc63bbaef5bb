"""Runs of bits as numpy arrays of 0 and 1, packed eight to a byte, lowest bit first.

    bits = np.concatenate([fixed(values_N, width=5), unary(quotients_N)])
    data = to_bytes(bits)

Suffix legend: N numbers.
"""

import numpy as np


def fixed(values_N: np.ndarray, width: int) -> np.ndarray:
    """The low `width` bits of each number [N * width], one after the other."""
    return ((values_N[:, None] >> np.arange(width)) & 1).astype(np.uint8).reshape(-1)


def read_fixed(bits: np.ndarray, count: int, width: int) -> np.ndarray:
    """The inverse of `fixed`: int64 [count] from the first count * width bits; width at most 56."""
    if width == 0:
        return np.zeros(count, dtype=np.int64)
    octets = np.packbits(bits[: count * width].reshape(count, width), axis=1, bitorder="little")
    whole = np.zeros((count, 8), dtype=np.uint8)
    whole[:, : octets.shape[1]] = octets
    return whole.view("<i8")[:, 0]


def unary(values_N: np.ndarray) -> np.ndarray:
    """Each number as that many zeros and a one."""
    bits = np.zeros(len(values_N) + int(values_N.sum()), dtype=np.uint8)
    bits[np.cumsum(values_N + 1) - 1] = 1
    return bits


def read_unary(bits: np.ndarray, count: int) -> np.ndarray:
    """The inverse of `unary`: int64 [count]; fewer come back when the bits hold no more."""
    ones = np.flatnonzero(bits)[:count]
    return np.diff(ones, prepend=-1) - 1


def to_bytes(bits: np.ndarray) -> bytes:
    """Pack; the last byte is filled with zeros."""
    return np.packbits(bits, bitorder="little").tobytes()


def from_bytes(data: bytes | memoryview) -> np.ndarray:
    """Unpack all of it."""
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
