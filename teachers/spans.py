"""Targets from a teacher with another tokenizer: distributions over its own tokens, one a span of the same bytes.

    targets = SpanTargets(first, seen_S, later_S, span_T, shared)
    shared = shared_tokens(student_tokenizer, teacher_tokenizer)

Shapes: S spans, T student tokens, M tokens that both vocabularies have.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from herd.data.token_bytes import token_bytes
from teachers.targets import FullTargets


@dataclass(frozen=True)
class SharedTokens:
    """Tokens that stand for the same bytes (or the same special token) in both vocabularies, as pairs of ids."""

    student_M: torch.Tensor
    teacher_M: torch.Tensor
    share: float
    """Of the teacher's tokens that the student has too."""

    def to(self, device: torch.device) -> "SharedTokens":
        return SharedTokens(self.student_M.to(device), self.teacher_M.to(device), self.share)


@dataclass(frozen=True)
class SpanTargets:
    """What a teacher says of the spans of a batch, in order; spans do not overlap."""

    first: FullTargets
    """Its distribution at the first token of each span; `num_tokens` is S."""
    seen_S: torch.Tensor
    """int64: the token it read there."""
    later_S: torch.Tensor
    """fp32: log probability it gives the rest of its tokens of the span; 0 when there is none."""
    span_T: torch.Tensor
    """int64: the span that each token the student predicts belongs to; -1 for none."""
    shared: SharedTokens

    @property
    def num_tokens(self) -> int:
        return self.span_T.shape[0]


def shared_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> SharedTokens:
    """Pairs of ids with the same bytes; texts' begin and end are paired whatever they are called.

    Raises DataError for a tokenizer whose bytes cannot be told.
    """
    ours, theirs = _by_meaning(student), _by_meaning(teacher)
    both = sorted((ours[meaning], theirs[meaning]) for meaning in ours.keys() & theirs.keys())
    student_M, teacher_M = torch.tensor(both, dtype=torch.int64).reshape(-1, 2).T
    return SharedTokens(student_M, teacher_M, share=len(both) / len(theirs))


def _by_meaning(tokenizer: PreTrainedTokenizerBase) -> dict[bytes | str, int]:
    """Bytes, or the name of a special token -> id; of several ids the last (byte tokens come first)."""
    meanings: dict[bytes | str, int] = {}
    for id, text in enumerate(token_bytes(tokenizer)):
        if text is not None:
            meanings[text] = id
    for id, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            meanings[token.content] = id
    ends = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    for token in set(ends.values()):
        meanings.pop(token, None)
    if ends["bos_token"] == ends["eos_token"]:  # GPT-2: one token for both, which stands at the end of a text
        del ends["bos_token"]
    return meanings | {
        name: tokenizer.convert_tokens_to_ids(token) for name, token in ends.items() if token is not None
    }
