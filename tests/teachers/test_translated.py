"""What a teacher with another tokenizer says of a student's rows, against a forward of its own on the same text.

pytest tests/teachers/test_translated.py
"""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from herd.data.encoding import encode_documents
from herd.data.sources import Document
from herd.data.token_bytes import token_bytes
from teachers.frozen import FrozenTeacher
from teachers.translated import TranslatedTeacher
from tests.teachers.vocabularies import byte_level, sentencepiece, text


@pytest.fixture(scope="module")
def student():
    return byte_level(300)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def teacher(request):
    return byte_level(420, backwards=True) if request.param == "byte-level" else sentencepiece(120, seed=2)


def small_model(tokenizer, *, longest=1024):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=longest)
    # Far from uniform, so that a token out of place would be seen.
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data.mul_(40)
    return model


def documents(tokenizer, *seeds, words=6):
    """Rows of whole documents, all of the length of the shortest."""
    texts = [Document(str(seed), text(seed, words=words)) for seed in seeds]
    return [torch.from_numpy(d.tokens_L.astype(np.int64)) for d in encode_documents(texts, tokenizer)]


def test_distributions_and_probabilities_are_those_of_the_teachers_own_forward(student, teacher):
    model = small_model(teacher)
    rows = documents(student, 1, 2, words=30)
    length = max(len(row) for row in rows)
    padded = [torch.cat((row, row[-1].expand(length - len(row)))) for row in rows]
    targets = TranslatedTeacher(model, student=student, teacher=teacher).targets(torch.stack(padded))
    ours, theirs = token_bytes(student), token_bytes(teacher)
    bytes_of = lambda ids, parts: b"".join(parts[id] or b"" for id in ids.tolist()).lstrip(b" ")  # noqa: E731
    for place, row in enumerate(rows):
        (own,) = documents(teacher, place + 1, words=30)
        log_p = model(input_ids=own[None]).logits[0].log_softmax(-1)
        reached = {bytes_of(own[:end], theirs): end for end in range(1, len(own))}
        spans_T = targets.span_T[place * length : place * length + len(row) - 1]
        for span in spans_T.unique().tolist()[:-1]:  # the last is the end of the text, which has no bytes
            places = (spans_T == span).nonzero().squeeze(1)
            first = reached[bytes_of(row[: places[0] + 1], ours)]
            end = reached[bytes_of(row[: places[-1] + 2], ours)]
            mine = targets.first.logits(slice(span, span + 1))[0].log_softmax(-1)
            torch.testing.assert_close(mine, log_p[first - 1], rtol=1e-4, atol=1e-4)
            assert targets.seen_S[span] == own[first]
            later = log_p[torch.arange(first, end - 1), own[first + 1 : end]].sum()
            torch.testing.assert_close(targets.later_S[span], later, rtol=1e-4, atol=1e-4)
    assert (targets.later_S < -1e-3).any() and ((targets.span_T + 1).bincount()[1:] > 1).any(), (
        "longer spans on both sides"
    )


def test_with_the_students_own_tokenizer_every_position_has_the_plain_teachers_distribution(student):
    model = small_model(student)
    ids_BT = torch.stack([row[:20] for row in documents(student, 3, 4)])
    plain = FrozenTeacher(model).targets(ids_BT)
    targets = TranslatedTeacher(model, student=student, teacher=student).targets(ids_BT)
    cut = 20 - 3  # the row may end inside a word, which is then read otherwise
    for place in range(2):
        spans = targets.span_T[place * 20 : place * 20 + cut]
        assert (spans.diff() == 1).all() and spans[0] >= 0
        mine = targets.first.logits(slice(int(spans[0]), int(spans[-1]) + 1))
        torch.testing.assert_close(mine, plain.logits(slice(place * 20, place * 20 + cut)))
    assert targets.span_T[[19, 39]].tolist() == [-1, -1], "what follows a row's last token is not known"


def test_the_score_is_the_nats_of_the_bytes_in_spans(student, teacher):
    model = small_model(teacher)
    row = documents(student, 5)[0][None]
    total, count = TranslatedTeacher(model, student=student, teacher=teacher).score(row, row[0])
    own = documents(teacher, 5)[0]
    ce_T = torch.nn.functional.cross_entropy(model(input_ids=own[None]).logits[0, :-1], own[1:], reduction="none")
    # A whole document: all that follows its begin is predicted by both, but for a space that stands for no byte of it.
    no_byte = own[1:] == teacher.convert_tokens_to_ids("▁") if teacher.bos_token == "<s>" else torch.zeros(len(ce_T))
    assert total == pytest.approx((ce_T * (1 - no_byte.float())).sum().item(), rel=1e-4)
    assert count == row.shape[1] - 1


def test_a_row_longer_than_the_teacher_reads_has_targets_up_to_there(student):
    teacher = byte_level(420, seed=1)
    row = documents(student, 6, words=20)[0][None]
    targets = TranslatedTeacher(small_model(teacher, longest=16), student=student, teacher=teacher).targets(row)
    covered = (targets.span_T >= 0).nonzero().squeeze(1)
    assert 5 < len(covered) < row.shape[1] / 2 and covered.max() < row.shape[1] / 2


def test_a_row_without_text_has_no_spans(student, teacher):
    row = torch.full((1, 4), student.convert_tokens_to_ids("<begin>"))
    targets = TranslatedTeacher(small_model(teacher), student=student, teacher=teacher).targets(row[:, :1])
    assert targets.first.num_tokens == 0 and targets.span_T.tolist() == [-1]
