"""A teacher's distributions over a chunk of tokens: what it measured on them, its largest classes, random ones.

    chunk = Distributions.of(logits_CV, labels_C, temperature=1.0)
    values_CK, ids_CK = chunk.largest(16)

Suffix legend: C tokens of a chunk, R of them at a time, V vocabulary, S spans of s ids, K classes, P points.
"""

from dataclasses import dataclass

import torch

from herd.run.errors import NumericalError

IGNORED = -100
ELEMENTS_AT_ONCE = 1 << 20  # logits worked on at a time: they and what is made of them stay in a CPU's cache
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
        count, vocabulary = logits_CV.shape
        span = span_of(vocabulary)
        probs_CV = logits_CV.new_zeros((count, vocabulary + -vocabulary % span), dtype=torch.float32)
        entropy_C, ce_C = (logits_CV.new_empty(count, dtype=torch.float32) for _ in range(2))
        at_once = max(1, ELEMENTS_AT_ONCE // vocabulary)
        for rows in (slice(start, start + at_once) for start in range(0, count, at_once)):
            logs_RV = torch.log_softmax(logits_CV[rows].float(), dim=-1)
            ce_C[rows] = -logs_RV.gather(1, labels_C[rows].clamp_min(0)[:, None])[:, 0]
            if temperature != 1.0:
                logs_RV = torch.log_softmax(logits_CV[rows].float() / temperature, dim=-1)
            probs_RV = torch.exp(logs_RV, out=probs_CV[rows, :vocabulary])
            entropy_C[rows] = -torch.linalg.vecdot(probs_RV, logs_RV)
            if bool(entropy_C[rows].isnan().any()):
                entropy_C[rows] = -torch.linalg.vecdot(probs_RV, logs_RV.clamp_min(LOWEST))  # masses of zero
        if bool(entropy_C.isnan().any()):
            raise NumericalError(_fault(logits_CV, int(entropy_C.isnan().nonzero()[0, 0])))
        probs_CSs = probs_CV.unflatten(1, (-1, span))
        return cls(probs_CSs, probs_CSs.sum(-1).double(), entropy_C, ce_C.masked_fill(labels_C == IGNORED, 0.0))

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
        """Give these classes no mass, and sum their spans again (without the error of a difference)."""
        self.probs_CSs.flatten(1).scatter_(1, ids_CK, 0.0)
        spans_CK = ids_CK // self.span
        self.mass_CS.scatter_(1, spans_CK, self._spans(spans_CK).sum(-1).double())

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
    """Ids a span holds: a power of two near the square root of V / 16, one that divides V if there is."""
    near = 1 << max(2, ((vocabulary // 16).bit_length()) // 2)
    return next((span for span in (near, near // 2, near * 2) if vocabulary % span == 0), near)


def _fault(logits_CV: torch.Tensor, at: int) -> str:
    logits_V = logits_CV[at]
    if bool(logits_V.isnan().any()):
        what = f"NaN ({int(logits_V.isnan().sum())} of {len(logits_V)} classes)"
    else:
        what = "infinite" if bool((logits_V == torch.inf).any()) else "minus infinity for every class"
    return f"teacher logits of token {at} of the block are {what}"
