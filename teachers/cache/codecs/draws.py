"""Random numbers that depend on a row's key and a token's place alone: the same cache can be made again.

    uniforms_TP = uniforms(key, tokens_T, stream=0, count=2)      float64 in [0, 1)

SplitMix64 as a hash of (seed, key, place, stream, number). Suffix legend: T tokens, P numbers of each.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(key: int, tokens_T: np.ndarray, *, stream: int, count: int, seed: int = 0) -> np.ndarray:
    """Numbers [T, count] for the tokens at these places of the row called `key` (any 64 bits, signed)."""
    start = _mix(np.array([key & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) ^ _mix(np.array([seed], dtype=np.uint64)))
    tokens_T1 = _mix(start + GOLDEN * (tokens_T.astype(np.uint64)[:, None] + np.uint64(1)))
    numbers_P = np.arange(count, dtype=np.uint64) + np.uint64(stream << 32)
    return (_mix(tokens_T1 + GOLDEN * (numbers_P + np.uint64(1))) >> np.uint64(11)) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014), modulo 2^64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
