"""What a weight may know of each token of a chunk: losses, entropies, and how the two gradients stand to each other.

    alpha_C = weighting.alpha(tokens)         # tokens.student_ce, tokens.products().soft, ...

Shapes: C tokens of the chunk; everything is [C], fp32 or fp64, without gradient. What costs a pass over the
vocabulary is a method, computed only when asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

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
    vocabulary: int
    """Classes of the student."""
    teacher_square_of: Callable[[], torch.Tensor]
    products_of: Callable[[], GradientProducts]
    asked: dict[str, torch.Tensor] = field(default_factory=dict)
    """What a weight asked for and what costs a pass, by its name in distill.losses.kernel.STATS."""

    def teacher_square(self) -> torch.Tensor:
        """Sum of p^2; of the sampled masses, where targets are sampled."""
        if "teacher_square" not in self.asked:
            self.asked["teacher_square"] = self.teacher_square_of()
        return self.asked["teacher_square"]

    def products(self) -> GradientProducts:
        """Of the gradients this loss really has: of these targets, this divergence and this temperature."""
        if "soft_square" not in self.asked:
            products = self.products_of()
            self.asked.update(soft_square=products.soft, hard_square=products.hard, cross=products.cross)
        return GradientProducts(*(self.asked[name] for name in ("soft_square", "hard_square", "cross")))


Alpha = float | torch.Tensor | Callable[[TokenStats], torch.Tensor]
"""Weight of the soft target: one number, one per token [T], or a function of the tokens' statistics."""
