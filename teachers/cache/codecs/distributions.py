"""A teacher's distributions over a chunk of tokens: what it measured on them, its largest classes, random ones.

    chunk = Distributions.of(logits_CV, labels_C, temperature=1.0)
    values_CK, ids_CK = chunk.largest(16)

Suffix legend: C tokens of a chunk, V vocabulary, S spans of s neighbouring ids, K classes, P points.
"""

from dataclasses import dataclass

import torch
from torch import nn

from herd.run.errors import NumericalError

IGNORED = -100
LOWEST = -1e30  # stands for minus infinity where it is multiplied by a mass of zero


@dataclass
class Distributions:
    """Masses by spans of ids, and the sum of each span: a class is found by two short searches, not one of length V."""

    probs_CSs: torch.Tensor
    """fp32 [C, S, s]; ids beyond the vocabulary have no mass."""
    mass_CS: torch.Tensor
    """fp64 mass of each span."""
    entropy_C: torch.Tensor
    """Nats, at the temperature of the masses."""
    ce_C: torch.Tensor
    """-log p(label) at temperature 1, nats; 0 where the label is ignored."""

    @classmethod
    def of(cls, logits_CV: torch.Tensor, labels_C: torch.Tensor, *, temperature: float) -> "Distributions":
        """Raises NumericalError naming the first token whose logits hold NaN or +infinity."""
        logs_CV = torch.log_softmax(logits_CV.float(), dim=-1)
        label_C = logs_CV.gather(1, labels_C.clamp_min(0)[:, None])[:, 0]
        ce_C = torch.where(labels_C == IGNORED, 0.0, -label_C)
        if temperature != 1.0:
            logs_CV = torch.log_softmax(logits_CV.float() / temperature, dim=-1)
        probs_CV = logs_CV.exp()
        entropy_C = -torch.linalg.vecdot(probs_CV, logs_CV)
        if bool(entropy_C.isnan().any()):
            entropy_C = -torch.linalg.vecdot(probs_CV, logs_CV.clamp_min(LOWEST))  # masses of zero
            _check(logits_CV, entropy_C)
        vocabulary = logits_CV.shape[1]
        span = span_of(vocabulary)
        probs_CSs = nn.functional.pad(probs_CV, (0, -vocabulary % span)).unflatten(1, (-1, span))
        return cls(probs_CSs, probs_CSs.sum(-1).double(), entropy_C, ce_C)

    @property
    def span(self) -> int:
        return self.probs_CSs.shape[2]

    def largest(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (fp64) and ids of the `count` largest classes of each token, in falling order."""
        spans = self.probs_CSs.shape[1]
        if spans <= 2 * count:
            values_CK, ids_CK = self.probs_CSs.flatten(1).topk(count)
            return values_CK.double(), ids_CK
        # Whatever is among the largest lies in one of as many spans with the largest maxima.
        spans_CK = self.probs_CSs.amax(-1).topk(count).indices
        values_CK, at_CK = self._spans(spans_CK).flatten(1).topk(count)
        return values_CK.double(), spans_CK.gather(1, at_CK // self.span) * self.span + at_CK % self.span

    def take_out(self, ids_CK: torch.Tensor) -> None:
        """Give these classes no mass, and sum the others again (without the error of a difference)."""
        self.probs_CSs.flatten(1).scatter_(1, ids_CK, 0.0)
        self.mass_CS = self.probs_CSs.sum(-1).double()

    def put_back(self, ids_CK: torch.Tensor, values_CK: torch.Tensor) -> None:
        """Add masses to classes that have none."""
        self.probs_CSs.flatten(1).scatter_add_(1, ids_CK, values_CK.float())
        self.mass_CS.scatter_add_(1, ids_CK // self.span, values_CK)

    def at(self, points_CP: torch.Tensor) -> torch.Tensor:
        """Ids at these fractions (fp64, in [0, 1)) of the mass there is, classes lying in the order of their ids."""
        reach_CS = self.mass_CS.cumsum(-1)
        points_CP = points_CP * reach_CS[:, -1:] * (1 - 1e-12)
        spans_CP = torch.searchsorted(reach_CS, points_CP, right=True).clamp_max(reach_CS.shape[1] - 1)
        within_CP = points_CP - (reach_CS - self.mass_CS).gather(1, spans_CP)
        probs_CPs = self._spans(spans_CP).double()
        passed_CP = (probs_CPs.cumsum(-1) <= within_CP[..., None]).sum(-1)
        places_s = torch.arange(self.span, device=probs_CPs.device)
        last_CP = ((probs_CPs > 0) * places_s).amax(-1)  # rounding must not lead past the last class with mass
        return spans_CP * self.span + torch.minimum(passed_CP, last_CP)

    def _spans(self, spans_CK: torch.Tensor) -> torch.Tensor:
        return self.probs_CSs.gather(1, spans_CK[..., None].expand(-1, -1, self.span))


def span_of(vocabulary: int) -> int:
    """Ids a span holds: a power of two near the square root of a sixteenth of the vocabulary."""
    return 1 << max(2, ((vocabulary // 16).bit_length()) // 2)


def _check(logits_CV: torch.Tensor, entropy_C: torch.Tensor) -> None:
    """Raise NumericalError if an entropy is NaN, which it is exactly where the logits are no distribution."""
    broken = entropy_C.isnan().nonzero()
    if not len(broken):
        return
    at = int(broken[0, 0])
    logits_V = logits_CV[at]
    if bool(logits_V.isnan().any()):
        what = f"NaN ({int(logits_V.isnan().sum())} of {len(logits_V)} classes)"
    else:
        what = "infinite" if bool((logits_V == torch.inf).any()) else "minus infinity for every class"
    raise NumericalError(f"teacher logits of token {at} of the block are {what}")
