"""Soft targets as a loss reads them: by slices of tokens, never knowing which teacher they came from.

    targets = LinearTargets(hidden_TG, head_VG)      # logits are made chunk by chunk
    targets = DenseTargets(logits_TV)                # logits exist already
    targets = SparseTargets(ids_TK, probs_TK, ...)   # what a cache kept of them
    targets = RoutedTargets((one, other), ...)       # rows of a batch have teachers of their own

Shapes: T tokens, G teacher width, V vocabulary, C tokens of a chunk, K classes kept of a token.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

CHUNK_TOKENS = 512  # whose logits exist at a time
LEAST_LOGIT = -1e30
"""Stands for -inf: no mass in any precision, and still finite after a division by a temperature."""


class FullTargets(Protocol):
    """A teacher's whole distribution, made a chunk at a time."""

    def logits(self, rows: slice) -> torch.Tensor:
        """Teacher logits [C, V] of these tokens: a tensor of its own, none -inf, without gradient."""
        ...

    @property
    def num_tokens(self) -> int:
        """T."""
        ...


@dataclass(frozen=True)
class LinearTargets:
    """The teacher's last hidden states and its head: no [T, V] tensor of the teacher ever exists."""

    hidden_TG: torch.Tensor
    head_VG: torch.Tensor

    def logits(self, rows: slice) -> torch.Tensor:
        with torch.no_grad():
            return self.hidden_TG[rows] @ self.head_VG.T

    @property
    def num_tokens(self) -> int:
        return self.hidden_TG.shape[0]


@dataclass(frozen=True)
class DenseTargets:
    """Teacher logits that exist already, for heads that are more than a matrix (soft caps, scales, biases)."""

    logits_TV: torch.Tensor

    def logits(self, rows: slice) -> torch.Tensor:
        # A class ruled out has mass 0 and logit -inf, whose product would be NaN.
        return self.logits_TV[rows].detach().clamp(min=max(LEAST_LOGIT, torch.finfo(self.logits_TV.dtype).min))

    @property
    def num_tokens(self) -> int:
        return self.logits_TV.shape[0]


Tail = Literal["bucket", "sampled"]
"""What a sparse target says of the classes it does not list.

`bucket`: together they have the rest of the mass (top-k). `sampled`: nothing; the listed masses sum to one and are an
unbiased estimate of the whole distribution.
"""


@dataclass(frozen=True)
class SparseTargets:
    """A few classes of each token's distribution, and what the teacher itself measured on all of them."""

    ids_TK: torch.Tensor
    """int64, in no order, each class once; slots that are not used come last and hold -1."""
    probs_TK: torch.Tensor
    """fp32 mass of each; 0 in slots that are not used."""
    tail: Tail
    entropy_T: torch.Tensor
    """Entropy of the whole distribution at `temperature`, nats."""
    ce_T: torch.Tensor
    """-log p(label) at temperature 1, nats."""
    temperature: float = 1.0
    """The one the masses were made with; a loss at another is refused."""
    present_T: torch.Tensor | None = None
    """False where there is no target: the loss is the cross-entropy there. None: all are present."""

    @property
    def num_tokens(self) -> int:
        return self.ids_TK.shape[0]

    def rows(self, rows: slice) -> "SparseTargets":
        """The targets of these tokens."""
        present = None if self.present_T is None else self.present_T[rows]
        listed = (self.ids_TK[rows], self.probs_TK[rows], self.tail)
        return SparseTargets(*listed, self.entropy_T[rows], self.ce_T[rows], self.temperature, present)


@dataclass(frozen=True)
class RoutedTargets:
    """Targets of several teachers, each of its own rows of a batch; a row may have none."""

    parts: tuple[FullTargets, ...]
    """One a teacher, over its rows in the batch's order."""
    part_B: tuple[int | None, ...]
    """Which of them each row of the batch has; None without a teacher."""
    present_T: torch.Tensor
    """False where there is no teacher: the loss is the cross-entropy there."""

    @property
    def num_tokens(self) -> int:
        return len(self.present_T)

    def logits(self, rows: slice) -> torch.Tensor | None:
        """As `FullTargets.logits`, 0 where there is no teacher; None when none of these tokens has one."""
        pieces = [(at, None if part is None else self.parts[part].logits(own)) for part, own, at in self._spans(rows)]
        made = [logits_CV for _, logits_CV in pieces if logits_CV is not None]
        if not made or len(pieces) == 1:
            return made[0] if made else None
        together_CV = made[0].new_zeros(rows.stop - rows.start, max(logits_CV.shape[1] for logits_CV in made))
        for at, logits_CV in pieces:
            if logits_CV is not None:
                together_CV[at, : logits_CV.shape[1]] = logits_CV
                together_CV[at, logits_CV.shape[1] :] = max(LEAST_LOGIT, torch.finfo(logits_CV.dtype).min)
        return together_CV

    def _spans(self, rows: slice) -> list[tuple[int | None, slice, slice]]:
        """(part, tokens of the part, the same tokens counted from the slice's start), in order, as long as can be."""
        length = self.num_tokens // len(self.part_B)
        spans: list[tuple[int | None, slice, slice]] = []
        for row in range(rows.start // length, -(-rows.stop // length)):
            part = self.part_B[row]
            first, last = max(rows.start, row * length), min(rows.stop, (row + 1) * length)
            shift = (self.part_B[:row].count(part) - row) * length
            if spans and spans[-1][0] == part:
                first = rows.start + spans.pop()[2].start
            spans.append((part, slice(first + shift, last + shift), slice(first - rows.start, last - rows.start)))
        return spans


SoftTargets = FullTargets | SparseTargets | RoutedTargets
"""What a loss takes."""


def make_targets(outputs: torch.Tensor, head_VG: torch.Tensor | None) -> FullTargets:
    """Targets from a model's outputs: hidden_TG with its head, or logits_TV when there is no plain head."""
    if head_VG is None:
        return DenseTargets(outputs.detach())
    return LinearTargets(outputs.detach(), head_VG.detach())


def log_probabilities(targets: FullTargets, tokens_T: torch.Tensor) -> torch.Tensor:
    """log p of one token at each place [T], fp32; the logits of a chunk exist at a time."""
    parts = [torch.zeros(0, device=tokens_T.device)]
    for start in range(0, len(tokens_T), CHUNK_TOKENS):
        rows = slice(start, min(start + CHUNK_TOKENS, len(tokens_T)))
        log_p_CV = targets.logits(rows).float().log_softmax(1)
        parts.append(log_p_CV.gather(1, tokens_T[rows, None]).squeeze(1))
    return torch.cat(parts)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel | None:
    """The part of a causal LM that ends in hidden states; None when it has no single such part."""
    parts = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return parts[0] if len(parts) == 1 else None


def has_plain_head(model: PreTrainedModel) -> bool:
    """True when logits are exactly decoder output times the head's matrix: tried on a few tokens, not assumed.

    Soft caps (Gemma 2), logit scales (Cohere) and head biases make it false; they are kept by taking whole logits.
    """
    head, decoder = model.get_output_embeddings(), decoder_of(model)
    if decoder is None or not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    was_training = model.training
    model.eval()
    with torch.no_grad():
        probe_BT = torch.arange(8, device=head.weight.device)[None] % head.weight.shape[0]
        hidden = decoder(input_ids=probe_BT, use_cache=False).last_hidden_state
        same = torch.equal(nn.functional.linear(hidden, head.weight), model(input_ids=probe_BT, use_cache=False).logits)
    model.train(was_training)
    return same
