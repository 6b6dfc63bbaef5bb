"""Problems a loss is tried on: logits of a student and a teacher, labels, and what is kept of the teacher.

    problem = draw(seed=0, tokens=12, classes=11)

Shapes: T tokens, V vocabulary, K classes listed of a token. All float64; a label belongs to the logits at its index.
"""

from dataclasses import dataclass, replace

import torch

IGNORED = -100
RULED_OUT = -1e4
"""Logit of padding: its exp is 0 even in float64, while -inf itself would make 0 x inf in honest losses."""


@dataclass(frozen=True)
class Problem:
    """One call's worth."""

    student_TV: torch.Tensor
    teacher_TV: torch.Tensor
    labels_T: torch.Tensor
    rows: int = 1
    """T is rows x positions, for losses that want [B, T, V]."""
    listed: int | None = None
    """Classes a sparse target lists: the teacher's likeliest. None: all."""
    ids_TK: torch.Tensor | None = None
    """Listed classes chosen otherwise, with their masses."""
    probs_TK: torch.Tensor | None = None

    @property
    def valid_T(self) -> torch.Tensor:
        """True where there is a label."""
        return self.labels_T != IGNORED

    @property
    def num_valid(self) -> int:
        """Tokens with a label."""
        return int(self.valid_T.sum())

    def sparse(self, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [T, K] and the teacher's masses [T, K] at this temperature."""
        if self.ids_TK is not None:
            return self.ids_TK, self.probs_TK
        p_TV = torch.softmax(self.teacher_TV / temperature, 1)
        probs_TK, ids_TK = p_TV.topk(self.listed or p_TV.shape[1], dim=1)
        return ids_TK, probs_TK

    def sampled(self, temperature: float, uniform_T1: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """An unbiased draw: the likeliest K - 1 classes with their masses, and one of the others with all the rest.

        `uniform_T1`, in (0, 1), draws it; without, it is the middle one, so that a token's draw is always the same.
        """
        if self.ids_TK is not None:
            return self.ids_TK, self.probs_TK
        p_TV = torch.softmax(self.teacher_TV / temperature, 1)
        head_TK, ids_TK = p_TV.topk((self.listed or p_TV.shape[1]) - 1, dim=1)
        others_TV = p_TV.scatter(1, ids_TK, 0.0)
        rest_T1 = others_TV.sum(1, keepdim=True)
        uniform_T1 = torch.full_like(rest_T1, 0.5) if uniform_T1 is None else uniform_T1
        drawn_T1 = torch.searchsorted(others_TV.cumsum(1), uniform_T1 * rest_T1)
        return torch.cat((ids_TK, drawn_T1), 1), torch.cat((head_TK, rest_T1), 1)

    def take(self, rows: slice) -> "Problem":
        """These tokens only, as one row."""
        parts = {"ids_TK": self.ids_TK, "probs_TK": self.probs_TK}
        kept = {name: part if part is None else part[rows] for name, part in parts.items()}
        return replace(
            self,
            student_TV=self.student_TV[rows],
            teacher_TV=self.teacher_TV[rows],
            labels_T=self.labels_T[rows],
            rows=1,
            **kept,
        )


def draw(
    seed: int,
    *,
    tokens: int = 12,
    classes: int = 11,
    spread: float = 2.0,
    ignored: tuple[int, ...] = (),
    listed: int | None = 4,
) -> Problem:
    """Normal logits times `spread`; `ignored` are the tokens without a label."""
    generator = torch.Generator().manual_seed(seed)
    student_TV, teacher_TV = spread * torch.randn(2, tokens, classes, generator=generator, dtype=torch.float64)
    labels_T = torch.randint(0, classes, (tokens,), generator=generator)
    labels_T[list(ignored)] = IGNORED
    return Problem(student_TV, teacher_TV, labels_T, listed=listed)


def identical(problem: Problem) -> Problem:
    """The same with the teacher for a student."""
    return replace(problem, student_TV=problem.teacher_TV.clone())


def widen(logits_TV: torch.Tensor, classes: int) -> torch.Tensor:
    """Padding that has no mass."""
    return torch.nn.functional.pad(logits_TV, (0, classes), value=RULED_OUT)
