"""What is kept of a row's distributions, as whole numbers, and its bytes.

    data = kept.to_bytes(vocabulary=202_048)
    kept = Kept.from_bytes(data, num_tokens=256, vocabulary=202_048)

Suffix legend: T tokens of the row, B blocks of BLOCK tokens, H classes with a mass of their own, S sampled ones.
"""

from dataclasses import dataclass

import numpy as np

from herd.run.errors import DataError
from teachers.cache.codecs import rice, sets

BLOCK = 128
"""Tokens that share a unit of mass; part of the format."""
ENTROPY_STEP = 1 / 32
CE_STEP = 1 / 64
MOST_NATS = 1024.0


@dataclass(frozen=True)
class Kept:
    """Masses are whole numbers of units; a token's units add up to `totals_B` of its block.

    Units that the listed classes do not use belong to the sampled ones, in equal parts (or, for top-k, to the bucket).
    """

    tokens_H: np.ndarray
    ids_H: np.ndarray
    units_H: np.ndarray
    """1 or more."""
    tokens_S: np.ndarray
    ids_S: np.ndarray
    totals_B: np.ndarray
    entropy_T: np.ndarray
    """Nats, as ce_T; both rounded to their steps when written."""
    ce_T: np.ndarray

    def to_bytes(self, *, vocabulary: int) -> bytes:
        """Counts as varints, then all numbers in Rice codes. docs/cache.md has it bit by bit."""
        num_tokens = len(self.entropy_T)
        ordered = sets.order(self.tokens_H, self.ids_H, vocabulary=vocabulary)
        own = sets.split(self.tokens_H, self.ids_H, vocabulary=vocabulary)
        sampled = sets.split(self.tokens_S, self.ids_S, vocabulary=vocabulary)
        chosen = [
            rice.Stream.best(_steps(self.entropy_T, ENTROPY_STEP)),
            rice.Stream.best(_steps(self.ce_T, CE_STEP)),
            rice.Stream.best(self.units_H[ordered] - 1),
        ]
        universes = sets.universes(num_tokens, vocabulary) * 2
        gaps = [
            rice.Stream(gaps, rice.shift_of_gaps(universe, len(gaps)))
            for universe, gaps in zip(universes, own + sampled, strict=True)
        ]
        header = [*self.totals_B.tolist(), *(stream.shift for stream in chosen)]
        return _varints([*header, *(len(stream.values_N) for stream in gaps)]) + rice.encode(chosen + gaps)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, *, num_tokens: int, vocabulary: int) -> "Kept":
        """Raises DataError for bytes that are not a row of so many tokens."""
        universes = sets.universes(num_tokens, vocabulary) * 2
        blocks = -(-num_tokens // BLOCK)
        header, start = _read_varints(data, blocks + 3 + len(universes))
        totals_B, shifts, counts = header[:blocks], header[blocks : blocks + 3], header[blocks + 3 :]
        heads = sum(counts[: len(counts) // 2])
        shapes = list(zip((num_tokens, num_tokens, heads), shifts, strict=True))
        shapes += [(count, rice.shift_of_gaps(size, count)) for size, count in zip(universes, counts, strict=True)]
        entropy_T, ce_T, units_H, *gaps = rice.decode(data[start:], shapes)
        tokens_H, ids_H = sets.join(gaps[: len(gaps) // 2], vocabulary=vocabulary)
        tokens_S, ids_S = sets.join(gaps[len(gaps) // 2 :], vocabulary=vocabulary)
        if max(tokens_H.max(initial=0), tokens_S.max(initial=0)) >= num_tokens:
            raise DataError(f"a coded row of {len(data)} bytes has more than {num_tokens} tokens")
        totals_B = np.array(totals_B, dtype=np.int64)
        entropy_T, ce_T = entropy_T * ENTROPY_STEP, ce_T * CE_STEP
        return cls(tokens_H, ids_H, units_H + 1, tokens_S, ids_S, totals_B, entropy_T, ce_T)

    def masses(self) -> tuple[np.ndarray, np.ndarray]:
        """fp32 masses of the classes with their own, and of the sampled ones."""
        num_tokens = len(self.entropy_T)
        totals_T = np.repeat(self.totals_B, BLOCK)[:num_tokens]
        used_T = np.bincount(self.tokens_H, weights=self.units_H, minlength=num_tokens)
        sharing_T = np.bincount(self.tokens_S, minlength=num_tokens)
        share_T = (totals_T - used_T) / (totals_T * np.maximum(sharing_T, 1))
        own_H = (self.units_H / totals_T[self.tokens_H]).astype(np.float32)
        return own_H, share_T[self.tokens_S].astype(np.float32)


def _steps(values: np.ndarray, step: float) -> np.ndarray:
    """Rounded to whole steps; what is beyond MOST_NATS is cut to it."""
    return np.rint(values.clip(0.0, MOST_NATS) / step).astype(np.int64)


def _varints(numbers: list[int]) -> bytes:
    """LEB128: seven bits a byte, lowest first, the top bit set where more follow."""
    out = bytearray()
    for number in numbers:
        while number > 127:
            out.append(number & 127 | 128)
            number >>= 7
        out.append(number)
    return bytes(out)


def _read_varints(data: bytes | memoryview, count: int) -> tuple[list[int], int]:
    """The numbers, and how many bytes they took."""
    numbers, place = [], 0
    for _ in range(count):
        number, shift = 0, 0
        while True:
            if place == len(data):
                raise DataError(f"a coded row of {len(data)} bytes ends inside its header")
            octet = data[place]
            number |= (octet & 127) << shift
            place, shift = place + 1, shift + 7
            if octet < 128:
                break
        numbers.append(number)
    return numbers, place
