"""Random orders of N things that need no memory: any position's item is computed on its own.

shuffled(np.arange(8), count=100, key=(seed, epoch))      items at positions 0..7 of that order
"""

import numpy as np

ROUNDS = 6
MASK = (1 << 64) - 1
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def shuffled(positions_B: np.ndarray, *, count: int, key: tuple[int, ...]) -> np.ndarray:
    """The items (int64) at these positions of the permutation of 0..count-1 that `key` names.

    A Feistel network over the next power of four, walked until it lands below `count` (cycle walking: Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains"); fewer than four walks on average.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    keys = [_mix_number(_fold(key) + number) for number in range(ROUNDS)]
    items_B = np.asarray(positions_B, dtype=np.uint64)
    assert items_B.size == 0 or int(items_B.max()) < count
    items_B = _cross(items_B, half, keys)
    while (outside_B := items_B >= count).any():
        items_B[outside_B] = _cross(items_B[outside_B], half, keys)
    return items_B.astype(np.int64)


def _cross(values_B: np.ndarray, half: int, keys: list[int]) -> np.ndarray:
    """One pass of the network: a bijection of 0 .. 4**half - 1."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left_B, right_B = values_B >> bits, values_B & mask
    for key in keys:
        left_B, right_B = right_B, left_B ^ (_mix(right_B + np.uint64(key)) & mask)
    return (left_B << bits) | right_B


def _mix(values_B: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    values_B = (values_B ^ (values_B >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
    values_B = (values_B ^ (values_B >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
    return values_B ^ (values_B >> np.uint64(31))


def _mix_number(value: int) -> int:
    """`_mix` of one number."""
    value &= MASK
    value = (value ^ (value >> 30)) * MULTIPLIERS[0] & MASK
    value = (value ^ (value >> 27)) * MULTIPLIERS[1] & MASK
    return value ^ (value >> 31)


def _fold(key: tuple[int, ...]) -> int:
    """One number of several, such that their order matters."""
    state = 0x9E3779B97F4A7C15
    for number in key:
        state = _mix_number(state * 31 + number + 1)
    return state
