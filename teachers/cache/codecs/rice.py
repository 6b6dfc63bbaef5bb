"""Rice codes for many streams of small numbers at once: low bits at fixed width, the rest in unary.

    data = encode([Stream(gaps_N, shift=3), Stream(units_M, shift=2)])
    gaps_N, units_M = decode(data, [(N, 3), (M, 2)])

All low bits come first and all unary parts after them, so that one pass over the bits finds every quotient.
Suffix legend: N numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from herd.run.errors import DataError
from teachers.cache.codecs import bits

MOST_SHIFT = 24


@dataclass(frozen=True)
class Stream:
    """Numbers (int64, 0 or more) and how many of their low bits are not in unary."""

    values_N: np.ndarray
    shift: int

    @classmethod
    def best(cls, values_N: np.ndarray) -> "Stream":
        """With the shift that makes the code shortest."""
        costs = [len(values_N) * shift + int((values_N >> shift).sum()) for shift in range(MOST_SHIFT)]
        return cls(values_N, int(np.argmin(costs)))


def shift_of_gaps(universe: int, count: int) -> int:
    """The shift for the gaps between `count` random members of that many: floor(log2(0.69 universe / count)).

    Whole-number arithmetic: both sides of a cache must agree to the bit on any machine.
    """
    return max(0, (universe * 11 // (16 * max(count, 1))).bit_length() - 1)


def encode(streams: Sequence[Stream]) -> bytes:
    """All streams in one run of bytes. Their lengths and shifts are not in it: `decode` is told them."""
    low = [bits.fixed(stream.values_N, stream.shift) for stream in streams]
    quotients = np.concatenate([stream.values_N >> stream.shift for stream in streams])
    return bits.to_bytes(np.concatenate([*low, bits.unary(quotients)]))


def decode(data: bytes | memoryview, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """The streams, int64, of these (length, shift). Raises DataError when the bytes hold fewer numbers."""
    every = bits.from_bytes(data)
    counts = np.array([count for count, _ in shapes])
    place = sum(count * shift for count, shift in shapes)
    quotients = bits.read_unary(every[place:], int(counts.sum()))
    if len(quotients) < counts.sum():
        raise DataError(f"a coded run of {len(data)} bytes ends before its {counts.sum()} numbers do")
    place, streams = 0, []
    for part, (count, shift) in zip(np.split(quotients, np.cumsum(counts)[:-1]), shapes, strict=True):
        streams.append(part << shift | bits.read_fixed(every[place:], count, shift))
        place += count * shift
    return streams
