"""How many tokens' logits exist at a time: chunk_of(vocabulary)."""

CHUNK_BYTES = 8 * 2**20
"""Of one [C, V] tensor in fp32: small beside the head's gradient, big enough for the matrix products."""
LEAST_CHUNK = 64
"""Tokens; with fewer the head and its gradient are read and written too often."""
CHUNKS_OF_A_GROUP = 4
"""Whose gradients are kept, in bf16, until they go into the head's fp32 gradient together."""


def chunk_of(vocabulary: int) -> int:
    """Tokens of a chunk where none are asked for."""
    return max(LEAST_CHUNK, CHUNK_BYTES // (4 * vocabulary))
