"""What a weight may know of each token of a chunk: losses, entropies, and how the two gradients stand to each other.

    alpha_C = weighting.alpha(tokens)         # tokens.student_ce, tokens.products().soft, ...

Shapes: C tokens of the chunk; everything is [C], fp32 or fp64, without gradient. What costs a pass over the
vocabulary is a method, computed only when asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GradientProducts:
    """Inner products of a token's two gradients in the logits: the soft loss's u, and the label's v = q - e_y."""

    soft: torch.Tensor
    """u.u"""
    hard: torch.Tensor
    """v.v"""
    cross: torch.Tensor
    """u.v"""


@dataclass(frozen=True)
class TokenStats:
    """Everything of one chunk. Without a teacher the teacher's part is 0."""

    student_ce: torch.Tensor
    """-log q(label), nats."""
    teacher_ce: torch.Tensor
    """-log p(label), nats."""
    kl: torch.Tensor
    """KL(teacher || student) at the loss's temperature, nats, whichever divergence is trained."""
    teacher_entropy: torch.Tensor
    """H(p) at the loss's temperature, nats."""
    teacher_peak: torch.Tensor
    """max p, at the loss's temperature."""
    teacher_square_of: Callable[[], torch.Tensor]
    products_of: Callable[[], GradientProducts]

    def teacher_square(self) -> torch.Tensor:
        """Sum of p^2; of the sampled masses, where targets are sampled."""
        return self.teacher_square_of()

    def products(self) -> GradientProducts:
        """Of the gradients this loss really has: of these targets, this divergence and this temperature."""
        return self.products_of()


Alpha = float | torch.Tensor | Callable[[TokenStats], torch.Tensor]
"""Weight of the soft target: one number, one per token [T], or a function of the tokens' statistics."""
