"""Tokens sorted by how sure the teacher is: bins of its entropy that mean the same for every vocabulary.

    bin_C = entropy_bins.of(tokens.teacher_entropy); entropy_bins.NAMES[bin_C[0]]

A bin is known before the label is, so a weight that differs between bins selects on no noise.
"""

import torch

EDGES = (0.05, 0.2, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)
"""Nats. Text has many nearly certain tokens and few beyond 5 nats."""
COUNT = len(EDGES) + 1
NAMES = (*(f"{low:g}-{high:g}" for low, high in zip((0.0, *EDGES), EDGES, strict=False)), f"{EDGES[-1]:g}-inf")


def of(entropy_C: torch.Tensor) -> torch.Tensor:
    """Bin of each token, int64 [C]; an edge belongs to the bin below it."""
    return torch.bucketize(entropy_C, torch.tensor(EDGES, dtype=entropy_C.dtype, device=entropy_C.device))
