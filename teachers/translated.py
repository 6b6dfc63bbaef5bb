"""A frozen teacher with a tokenizer of its own: it reads the student's text, not the student's tokens.

    teacher = TranslatedTeacher(model, student=tokenizer, teacher=load_tokenizer(source))
    targets = teacher.targets(input_ids_BT)       # SpanTargets over B*T tokens of the student

Shapes: B rows, T student tokens a row, U teacher tokens a row, S spans, N later tokens of spans.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerFast

from teachers.alignment import align
from teachers.frozen import FrozenTeacher
from teachers.spans import SpanTargets, shared_tokens
from teachers.targets import log_probabilities, make_targets
from teachers.translation import Translated, Translator


class TranslatedTeacher(FrozenTeacher):
    """One forward a batch, over the batch's text cut by the teacher's tokenizer; any number of students.

    Raises DataError for a tokenizer whose bytes cannot be told.
    """

    def __init__(self, model: nn.Module, *, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> None:
        super().__init__(model)
        longest = model.config.get_text_config().max_position_embeddings
        self._translator = Translator(student, teacher, longest=longest)
        self._shared = shared_tokens(student, teacher)

    def targets(self, input_ids_BT: torch.Tensor) -> SpanTargets:
        """Targets of the spans that both tokenizers cut out of each row.

        The first token of a row has none, nor has the one after its last: the row does not say what that is.
        """
        rows = self._translator.translate(input_ids_BT.cpu().numpy())
        device = input_ids_BT.device
        ids_BU = np.zeros((len(rows), max(1, *(len(row.ids) for row in rows))), dtype=np.int64)
        for place, row in enumerate(rows):
            ids_BU[place, : len(row.ids)] = row.ids  # padding follows, where causal attention does not see it
        outputs, head_VG = self.outputs(torch.from_numpy(ids_BU).to(device))
        span_T, first_S, last_S = _place_spans(rows, input_ids_BT.shape[1], ids_BU.shape[1])
        seen = torch.from_numpy(ids_BU.reshape(-1)).to(device)
        first_S, last_S = torch.from_numpy(first_S).to(device), torch.from_numpy(last_S).to(device)
        return SpanTargets(
            first=make_targets(outputs[first_S - 1], head_VG),
            seen_S=seen[first_S],
            later_S=_later(outputs, head_VG, seen, first_S, last_S),
            span_T=torch.from_numpy(span_T).to(device),
            shared=self._shared.to(device),
        )

    def score(self, input_ids_BT: torch.Tensor, labels_T: torch.Tensor) -> tuple[float, int]:
        """-log p of the spans' bytes, summed, in nats, and how many of the student's tokens they are."""
        targets = self.targets(input_ids_BT)
        seen_ce = -log_probabilities(targets.first, targets.seen_S)
        return (seen_ce - targets.later_S).double().sum().item(), int((targets.span_T >= 0).sum())


def _place_spans(
    rows: list[Translated], length: int, their_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The span of each of the B*T predictions (-1: none), and first and last teacher token [S] among B*U.

    A span needs a token before it on both sides, which predicts its first one.
    """
    span_T = np.full(len(rows) * length, -1, dtype=np.int64)
    firsts, lasts, count = [], [], 0
    for place, row in enumerate(rows):
        spans_S4 = align(row.student, row.teacher)
        spans_S4 = spans_S4[(spans_S4[:, 0] > 0) & (spans_S4[:, 2] > 0)]
        first_S, last_S, their_first_S, their_last_S = spans_S4.T
        sizes_S = last_S - first_S + 1
        # The token at place l is predicted at place l - 1.
        within = np.arange(sizes_S.sum()) - np.repeat(np.cumsum(sizes_S) - sizes_S, sizes_S)
        predicted_at = place * length + np.repeat(first_S - 1, sizes_S) + within
        span_T[predicted_at] = count + np.repeat(np.arange(len(spans_S4)), sizes_S)
        firsts.append(place * their_length + their_first_S)
        lasts.append(place * their_length + their_last_S)
        count += len(spans_S4)
    return span_T, np.concatenate(firsts), np.concatenate(lasts)


def _later(
    outputs: torch.Tensor, head_VG: torch.Tensor | None, seen: torch.Tensor, first_S: torch.Tensor, last_S: torch.Tensor
) -> torch.Tensor:
    """Log probability of each span's tokens after its first one, summed [S]."""
    sizes_S = last_S - first_S
    number_N = torch.repeat_interleave(torch.arange(len(sizes_S), device=sizes_S.device), sizes_S)
    within_N = torch.arange(len(number_N), device=sizes_S.device) - (sizes_S.cumsum(0) - sizes_S)[number_N]
    token_N = first_S[number_N] + 1 + within_N
    log_p_N = log_probabilities(make_targets(outputs[token_N - 1], head_VG), seen[token_N])
    return log_p_N.new_zeros(len(sizes_S)).index_add_(0, number_N, log_p_N)
