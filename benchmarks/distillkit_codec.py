"""DistillKit's sparse targets (its compression/config.py and monotonic_logprobs.py), written anew for comparison only.

    codec = BUDGET;  codec.bytes_per_token(202_048);  ids_TK, probs_TK = codec.rebuilt(logits_TV, missing="zero")

Top-k log-probabilities in falling order, the first few exact, the others by a least-squares fit over their place.
Suffix legend: T tokens, V vocabulary, K kept classes.
"""

from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

import torch

TERMS = {"sqrt": torch.sqrt, "exp": torch.exp}


@dataclass(frozen=True)
class DistillKit:
    """One configuration: k classes, `exact` of them in bf16, fp32 coefficients for the others, no residuals."""

    k: int
    exact: int
    terms: tuple[int | str, ...]

    def bytes_per_token(self, vocabulary: int) -> int:
        """Its `total_bits` / 8. The parquet around it is not counted, as it is not in its own figures."""
        return ceil(self.k * ceil(log2(vocabulary)) / 8) + 2 * self.exact + 4 * len(self.terms)

    def rebuilt(
        self, logits_TV: torch.Tensor, *, missing: Literal["zero", "symmetric_uniform"]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and masses a loss gets: for "zero" (its default) they are made to sum to one."""
        values_TK, ids_TK = logits_TV.double().log_softmax(-1).topk(self.k)
        exact_TK = values_TK[:, : self.exact].to(torch.bfloat16).double()
        places_K = torch.arange(self.k - self.exact, dtype=torch.float64)
        columns = [places_K**term if isinstance(term, int) else TERMS[term](places_K) for term in self.terms]
        basis_KN = torch.stack(columns, -1)
        fit_TN = (torch.linalg.pinv(basis_KN) @ values_TK[:, self.exact :].T).T.float().double()
        logs_TK = torch.cat([exact_TK, fit_TN @ basis_KN.T], -1)
        return ids_TK, logs_TK.softmax(-1) if missing == "zero" else logs_TK.exp()


BUDGET = DistillKit(50, 1, (0, 1, "sqrt"))
RECOMMENDED = DistillKit(128, 16, (0, 1, 2, 3, 4, "sqrt"))
