"""How many tokens are worked on at a time.

chunk_of(vocabulary, itemsize, device)    tokens whose logits exist, in the inputs' precision: what matrix products see
block_of(vocabulary)                      tokens mixed at a time on a CPU, in fp32: what stays in a core's cache
"""

import torch

CHUNK_BYTES = 16 * 2**20
"""Small beside the head's gradient, big enough for the products that read the head and add to its gradient."""
LEAST_CHUNK = {"cpu": 64, "cuda": 512}
"""A GPU computes hundreds of operations in the time it reads one byte, and each product reads the whole head."""
BLOCK_BYTES = 2**20


def chunk_of(vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Tokens of a chunk where none are asked for; `itemsize` is the bytes of an input's number."""
    return max(LEAST_CHUNK.get(device.type, LEAST_CHUNK["cuda"]), CHUNK_BYTES // (itemsize * vocabulary))


def block_of(vocabulary: int) -> int:
    """Tokens of a block: a dozen passes over its probabilities never leave the cache."""
    return max(1, BLOCK_BYTES // (4 * vocabulary))


def slices(start: int, stop: int, size: int) -> list[slice]:
    """[start, stop) in pieces of `size`, the last one shorter."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
