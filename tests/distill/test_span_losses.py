"""Losses for a teacher with another tokenizer against float64 autograd.

pytest tests/distill/test_span_losses.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.losses import DenseTargets, LinearTargets, fused_linear_distillation
from distill.losses.kernel import STATS
from distill.losses.merged_spans import FLOOR, merged_loss
from distill.losses.spans import span_distillation
from distill.losses.uld import sorted_difference
from teachers.spans import SharedTokens, SpanTargets

SPANS = [-1, 0, 0, 1, 2, 2, 2, -1, 3, 4, 4, -1]
IDENTITY = SharedTokens(torch.arange(11), torch.arange(11), share=1.0)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_problem(seed=0, vocabulary=11, teacher_vocabulary=9, shared=5, width=6):
    generator = torch.Generator().manual_seed(seed)
    hidden, head = draw(len(SPANS), width, seed=seed).requires_grad_(), draw(vocabulary, width, seed=seed + 1)
    labels = torch.randint(0, vocabulary, (len(SPANS),), generator=generator)
    pairs = (torch.randperm(size, generator=generator)[:shared] for size in (vocabulary, teacher_vocabulary))
    targets = SpanTargets(
        first=LinearTargets(draw(5, 4, seed=seed + 2), draw(teacher_vocabulary, 4, seed=seed + 3)),
        seen_S=torch.randint(0, teacher_vocabulary, (5,), generator=generator),
        later_S=torch.tensor([0.0, -0.7, 0.0, -1.3, 0.0], dtype=torch.float64),
        span_T=torch.tensor(SPANS),
        shared=SharedTokens(*pairs, share=shared / teacher_vocabulary),
    )
    return hidden, head.requires_grad_(), labels, targets


def reference_loss(hidden, head, labels, targets, alpha, kind, matched_weight=None):
    """Span by span from the definitions, differentiated by autograd."""
    log_q = (hidden @ head.T).log_softmax(-1)
    log_p = targets.first.logits(slice(0, 5)).log_softmax(-1)
    ce = -log_q.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    valid, total, shared = labels != -100, 0.0, targets.shared
    weights = valid.double()
    for span in range(5):
        places = [place for place, number in enumerate(SPANS) if number == span]
        if not all(valid[places]):
            continue
        q = (log_q[places[0]] - ce[places[1:]].sum()).exp()
        p = (log_p[span] + targets.later_S[span]).exp()
        weights[places] = 1 - alpha
        if kind == "uld":
            total = total + alpha * sorted_gap(q, p)
            continue
        q_coarse, p_coarse = (
            torch.cat((masses[ids], 1 - masses[ids].sum(0, keepdim=True)))
            for masses, ids in ((q, shared.student_M), (p, shared.teacher_M))
        )
        kl = (p_coarse * (p_coarse.log() - q_coarse.log())).sum()
        rest = sorted_gap(without(q, shared.student_M), without(p, shared.teacher_M))
        weight = shared.share if matched_weight is None else matched_weight
        total = total + alpha * (weight * kl + (1 - weight) * rest)
    return (total + (weights * ce).sum()) / valid.sum()


def without(masses, ids):
    return masses[[place for place in range(len(masses)) if place not in ids.tolist()]]


def sorted_gap(q, p):
    size = max(len(q), len(p))
    ranked = [torch.cat((m.sort(descending=True).values, m.new_zeros(size - len(m)))) for m in (q, p)]
    return (ranked[0] - ranked[1]).abs().sum()


@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["uld", "spans"]),
    alpha=st.floats(0, 1),
    chunk=st.integers(1, 13),
    ignored=st.sampled_from([(), (0,), (5,), (3, 9)]),
    vocabularies=st.sampled_from([(11, 9), (9, 11), (12, 12)]),
    matched_weight=st.sampled_from([None, 0.0, 0.3, 1.0]),
)
def test_value_and_gradients_equal_float64_autograd(seed, kind, alpha, chunk, ignored, vocabularies, matched_weight):
    hidden, head, labels, targets = make_problem(seed, *vocabularies)
    labels[list(ignored)] = -100
    expected = reference_loss(hidden, head, labels, targets, alpha, kind, matched_weight)
    settings = {"kind": kind, "matched_weight": matched_weight, "alpha": alpha, "chunk_tokens": chunk}
    out = span_distillation(hidden, head, labels, targets, **settings)
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(2.5 * loss, (hidden, head)) for loss in (out.loss, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["uld", "spans"])
def test_whole_logits_take_the_same_path_and_pass_gradcheck(kind):
    hidden, head, labels, targets = make_problem(4)
    logits = (hidden @ head.T).detach().requires_grad_()
    loss = lambda x: span_distillation(x, None, labels, targets, kind=kind, alpha=0.6, chunk_tokens=4).loss  # noqa: E731
    expected = span_distillation(hidden, head, labels, targets, kind=kind, alpha=0.6).loss
    torch.testing.assert_close(loss(logits), expected)
    assert torch.autograd.gradcheck(loss, (logits,))


def test_with_one_tokenizer_spans_are_the_per_position_loss():
    hidden, head, labels, _ = make_problem(1)
    per_position = LinearTargets(draw(12, 4, seed=5), draw(11, 4, seed=6))
    spans = SpanTargets(per_position, labels, torch.zeros(12, dtype=torch.float64), torch.arange(12), IDENTITY)
    labels[3] = -100
    expected = fused_linear_distillation(hidden, head, labels, per_position, alpha=0.7)
    out = span_distillation(hidden, head, labels, spans, kind="spans", alpha=0.7, chunk_tokens=5)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-11, atol=0)
    torch.testing.assert_close(out.stats_ST, expected.stats_ST, rtol=1e-9, atol=1e-11)
    gradients = [torch.autograd.grad(loss, (hidden, head)) for loss in (out.loss, expected.loss)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["uld", "spans"])
def test_a_student_that_is_its_teacher_has_no_soft_loss_and_no_soft_gradient(kind):
    hidden, head, labels, _ = make_problem(2)
    twin = LinearTargets(hidden.detach(), head.detach())
    spans = SpanTargets(twin, labels, torch.zeros(12, dtype=torch.float64), torch.arange(12), IDENTITY)
    out = span_distillation(hidden, head, labels, spans, kind=kind, alpha=1.0)
    assert abs(out.loss.item()) < 1e-12
    if kind == "spans":
        assert max(g.abs().max().item() for g in torch.autograd.grad(out.loss, (hidden, head))) < 1e-12


def test_sorted_differences_ignore_which_class_is_which_and_pad_with_zeros():
    student, teacher = draw(4, 6).softmax(1), draw(4, 9, seed=1).softmax(1)
    distance, _ = sorted_difference(student, teacher)
    shuffled, _ = sorted_difference(student[:, torch.randperm(6)], teacher)
    torch.testing.assert_close(shuffled, distance)
    expected = torch.stack([sorted_gap(q, p) for q, p in zip(student, teacher, strict=True)])
    torch.testing.assert_close(distance, expected)


@given(seed=st.integers(0, 1000), shared=st.integers(1, 9), several=st.booleans(), scale=st.floats(0, 30))
def test_the_divergence_of_merged_masses_is_never_negative_and_never_more_than_of_all_classes(
    seed, shared, several, scale
):
    log_q, log_p = ((scale * draw(8, 9, seed=seed + n)).log_softmax(1) for n in (0, 1))
    later = -draw(8, seed=seed + 2).abs() * several
    ids = torch.arange(shared)
    out = merged_loss(
        *(log_q, log_p, later, later, torch.full((8,), several), SharedTokens(ids, ids, shared / 9)), kind="spans"
    )
    assert (out.kl_S > -FLOOR).all() and (out.loss_S > -FLOOR).all()
    if not several:
        whole = (log_p.exp() * (log_p - log_q)).sum(1)
        assert (out.kl_S <= whole + FLOOR).all()


def test_teacher_mass_on_tokens_the_student_lacks_moves_nothing_but_is_no_infinite_loss():
    # Every student token is shared: a student of one-token spans cannot leave mass to anything else.
    logits, labels = draw(3, 4).requires_grad_(), torch.tensor([0, 1, 2])
    teacher = draw(3, 6, seed=1)
    shared = SharedTokens(torch.arange(4), torch.arange(4), share=4 / 6)
    spans = SpanTargets(DenseTargets(teacher), labels, torch.zeros(3).double(), torch.arange(3), shared)
    out = span_distillation(logits, None, labels, spans, kind="spans", matched_weight=1.0, alpha=1.0)
    p, log_q = teacher.softmax(1)[:, :4], logits.log_softmax(1)
    head = p.sum(1)
    conditional = p / head[:, None]
    expected = (head * (conditional * (conditional.log() - log_q)).sum(1)).mean()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (out.loss, expected)))


def test_statistics_of_a_span_stand_at_its_first_token_and_compare_the_same_bytes():
    hidden, head, labels, targets = make_problem(3)
    seen = []
    alpha = lambda spans: seen.append(spans) or torch.full_like(spans.student_ce, 0.5)  # noqa: E731
    out = span_distillation(hidden, head, labels, targets, kind="spans", alpha=alpha)
    stats = dict(zip(STATS, out.stats_ST, strict=True))
    log_p = targets.first.logits(slice(0, 5)).log_softmax(1)
    teacher_ce = -log_p.gather(1, targets.seen_S[:, None]).squeeze(1) - targets.later_S
    torch.testing.assert_close(seen[0].teacher_ce, teacher_ce)
    torch.testing.assert_close(seen[0].student_ce[2], stats["ce"][4:7].sum())
    torch.testing.assert_close(stats["teacher_ce"][[1, 3, 4, 8, 9]], teacher_ce)
    assert stats["teacher_ce"][[2, 5, 6, 10]].abs().max() == 0
    outside = [0, 7, 11]
    torch.testing.assert_close(stats["teacher_ce"][outside], stats["ce"][outside])
    assert stats["alpha"].tolist() == [0.0 if place in outside else 0.5 for place in range(12)]


def test_bf16_inputs_stay_close_to_float64():
    hidden, head, labels, targets = make_problem(6)
    expected = span_distillation(hidden, head, labels, targets, kind="spans").loss
    wanted = torch.autograd.grad(expected, head)[0]
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, head)]
    out = span_distillation(*low, labels, targets, kind="spans")
    gradient = torch.autograd.grad(out.loss, low[1])[0].double()
    assert abs(out.loss.item() - expected.item()) / expected.item() < 0.02
    assert (gradient - wanted).norm() / wanted.norm() < 0.05
