"""The head's gradient, gathered over groups of tokens in fp32 whatever the inputs are.

    gathered = HeadGradient(head_VH)
    gathered.add(gradient_GV, hidden_GH); gradient_VH = gathered.take(scale)

Shapes: G tokens of a group, V vocabulary, H width, N classes of a tile.
"""

import torch

TILE = 2048
"""Classes whose bf16 product is widened and added at a time: both copies stay in cache."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Logits and sums are fp32, or fp64 when the inputs are (reference runs)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class HeadGradient:
    """Summing products in bf16 would lose the small ones; widening each would take longer than the product itself."""

    def __init__(self, head_VH: torch.Tensor) -> None:
        self._dtype = head_VH.dtype
        self._sum_VH = torch.zeros_like(head_VH, dtype=working_dtype(head_VH.dtype))
        self._low = self._sum_VH.dtype != head_VH.dtype
        if self._low:
            tile = (min(TILE, head_VH.shape[0]), head_VH.shape[1])
            self._product_NH, self._wide_NH = head_VH.new_empty(tile), self._sum_VH.new_empty(tile)

    def add(self, gradient_GV: torch.Tensor, hidden_GH: torch.Tensor) -> None:
        """Add gradient.T @ hidden."""
        if not self._low:
            self._sum_VH.addmm_(gradient_GV.T, hidden_GH)
            return
        for start in range(0, len(self._sum_VH), TILE):
            rows = slice(start, min(start + TILE, len(self._sum_VH)))
            product_NH, wide_NH = (x_NH[: rows.stop - start] for x_NH in (self._product_NH, self._wide_NH))
            torch.mm(gradient_GV[:, rows].T, hidden_GH, out=product_NH)
            self._sum_VH[rows].add_(wide_NH.copy_(product_NH))

    def take(self, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
        """The sum times a scale, in the head's own precision."""
        return self._sum_VH.mul_(scale).to(self._dtype)
