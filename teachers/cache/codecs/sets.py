"""Which classes a row keeps, coded as a set: gaps between sorted members, each octave of ids at its own density.

    octaves = split(tokens_N, ids_N, vocabulary=202_048)         gaps of every octave
    tokens_N, ids_N = join(octaves, vocabulary=202_048)

Tokenizers give low ids to frequent classes, so density falls from octave to octave. A set of k ids costs about
log2 C(V, k) bits instead of k log2 V, and less where ids are not spread evenly. Suffix legend: N members of the set.
"""

from collections.abc import Sequence

import numpy as np

FIRST_OCTAVE = 64


def octave_edges(vocabulary: int) -> np.ndarray:
    """0, 64, 128, 256 ... and the vocabulary's size."""
    doubled = [FIRST_OCTAVE << power for power in range(64) if FIRST_OCTAVE << power < vocabulary]
    return np.array([0, *doubled, vocabulary])


def split(tokens_N: np.ndarray, ids_N: np.ndarray, *, vocabulary: int) -> list[np.ndarray]:
    """For every octave: how many members lie between two neighbours, in order of (token, id).

    Each (token, id) may come once. Members come back from `join` in the order that `order` gives them.
    """
    edges = octave_edges(vocabulary)
    ordered = order(tokens_N, ids_N, vocabulary=vocabulary)
    tokens_N, ids_N = tokens_N[ordered], ids_N[ordered]
    octaves_N = np.searchsorted(edges, ids_N, side="right") - 1
    members_N = tokens_N * np.diff(edges)[octaves_N] + ids_N - edges[octaves_N]
    cuts = np.searchsorted(octaves_N, np.arange(1, len(edges) - 1))
    return [np.diff(members, prepend=-1) - 1 for members in np.split(members_N, cuts)]


def order(tokens_N: np.ndarray, ids_N: np.ndarray, *, vocabulary: int) -> np.ndarray:
    """Indices that sort a set by (octave, token, id)."""
    octaves_N = np.searchsorted(octave_edges(vocabulary), ids_N, side="right")
    span = int(tokens_N.max(initial=0)) + 1
    return np.argsort((octaves_N * span + tokens_N) * vocabulary + ids_N)


def join(gaps: Sequence[np.ndarray], *, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `split`: tokens and ids, int64, in order of (octave, token, id)."""
    edges = octave_edges(vocabulary)
    tokens, ids = [], []
    for gaps_N, first, size in zip(gaps, edges[:-1], np.diff(edges), strict=True):
        members_N = np.cumsum(gaps_N + 1) - 1
        tokens.append(members_N // size)
        ids.append(members_N % size + first)
    return np.concatenate(tokens), np.concatenate(ids)


def universes(num_tokens: int, vocabulary: int) -> list[int]:
    """Possible members of every octave."""
    return [int(size) * num_tokens for size in np.diff(octave_edges(vocabulary))]
