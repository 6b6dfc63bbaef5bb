"""Logits of -inf, as padded vocabularies have them: the loss is the one without those classes, its gradient 0 there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, log_softmax, softmax

from distill.losses import (
    DenseTargets,
    LinearTargets,
    SparseTargets,
    distillation_from_logits,
    fused_linear_distillation,
)
from distill.losses.divergences import NAMES, PARAMETERS
from distill.losses.kernel import STATS
from tests.distill.definitions import by_definition

V, PADDING = 13, 4


def make_problem(seed, tokens=7):
    """Logits over V classes, labels among them, and the places of the V classes among V + PADDING."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, tokens, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (tokens,), generator=generator)
    places = torch.randperm(V + PADDING, generator=generator)[:V].sort().values
    return student.requires_grad_(), teacher, labels, places


def padded(logits, places):
    return torch.full((len(logits), V + PADDING), -torch.inf, dtype=logits.dtype).index_copy(1, places, logits)


def assert_same_loss_and_gradient(out, wide, expected, student, places, **tolerance):
    """`wide` are the padded logits the loss saw; they must have the expected gradient, and exactly 0 in the padding."""
    torch.testing.assert_close(out.loss, expected, **tolerance)
    gradient = torch.autograd.grad(out.loss, wide)[0]
    torch.testing.assert_close(gradient[:, places], torch.autograd.grad(expected, student)[0], **tolerance)
    ruled_out = torch.ones(V + PADDING, dtype=torch.bool).index_fill_(0, places, False)
    assert (gradient[:, ruled_out] == 0).all()
    assert out.stats_ST.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adaptive_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), alpha=st.sampled_from([0.0, 0.3, 1.0]))
def test_classes_ruled_out_on_both_sides_are_as_good_as_absent(name, temperature, seed, alpha):
    student, teacher, labels, places = make_problem(seed)
    soft = temperature**2 * by_definition(name, PARAMETERS.get(name), student / temperature, teacher / temperature)
    expected = ((1 - alpha) * cross_entropy(student, labels, reduction="none") + alpha * soft).mean()
    wide = padded(student.detach(), places).requires_grad_()
    targets = DenseTargets(padded(teacher, places))
    options = {"alpha": alpha, "temperature": temperature, "divergence": name, "chunk_tokens": 3}
    out = distillation_from_logits(wide, places[labels], targets, **options)
    assert_same_loss_and_gradient(out, wide, expected, student, places, rtol=1e-9, atol=1e-11)


def test_adaptive_kl_equals_itself_on_the_reduced_vocabulary():
    student, teacher, labels, places = make_problem(1)
    options = {"alpha": 0.6, "divergence": "adaptive_kl"}
    expected = distillation_from_logits(student, labels, DenseTargets(teacher), **options).loss
    wide = padded(student.detach(), places).requires_grad_()
    out = distillation_from_logits(wide, places[labels], DenseTargets(padded(teacher, places)), **options)
    assert_same_loss_and_gradient(out, wide, expected, student, places)


def test_cross_entropy_smoothing_and_z_loss_leave_out_what_is_ruled_out():
    student, _, labels, places = make_problem(2)
    expected = cross_entropy(student, labels, label_smoothing=0.1) + 0.01 * student.logsumexp(1).square().mean()
    wide = padded(student.detach(), places).requires_grad_()
    out = distillation_from_logits(wide, places[labels], label_smoothing=0.1, z_loss=0.01)
    assert_same_loss_and_gradient(out, wide, expected, student, places)


@pytest.mark.parametrize("tail", ["bucket", "sampled"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sparse_targets_equal_those_of_the_reduced_vocabulary(tail, temperature):
    student, teacher, labels, places = make_problem(3)
    probs, ids = softmax(teacher / temperature, 1).topk(5, dim=1)
    probs = probs / probs.sum(1, keepdim=True) if tail == "sampled" else probs
    # An unused slot's -1 must not be read as class 0, which is ruled out here.
    places, known = torch.arange(PADDING, V + PADDING), (torch.zeros(len(ids)).double(),) * 2
    unused = torch.nn.functional.pad(probs, (0, 2)), torch.nn.functional.pad(places[ids], (0, 2), value=-1)
    narrow = SparseTargets(ids, probs, tail, *known, temperature)
    broad = SparseTargets(unused[1], unused[0], tail, *known, temperature)
    options = {"alpha": 0.7, "temperature": temperature}
    expected = distillation_from_logits(student, labels, narrow, **options).loss
    wide = padded(student.detach(), places).requires_grad_()
    out = distillation_from_logits(wide, places[labels], broad, **options)
    assert_same_loss_and_gradient(out, wide, expected, student, places)


def test_masks_may_differ_from_token_to_token_and_precision_may_be_low():
    student, teacher, labels, _ = make_problem(4, tokens=40)
    mask = torch.rand(student.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    mask.scatter_(1, labels[:, None], False)
    low = student.detach().bfloat16().masked_fill(mask, -torch.inf).requires_grad_()
    targets = DenseTargets(teacher.bfloat16().masked_fill(mask, -torch.inf))
    out = distillation_from_logits(low, labels, targets, alpha=0.5, normalizer=1.0)
    gradient, exact = torch.autograd.grad(out.loss, low)[0], student.detach().bfloat16().double().requires_grad_()
    log_q = log_softmax(exact.masked_fill(mask, -torch.inf), 1)
    p = softmax(targets.logits_TV.double(), 1)
    mixed = 0.5 * p + 0.5 * torch.nn.functional.one_hot(labels, V)
    expected = -(mixed * log_q.masked_fill(mask, 0.0)).sum() + 0.5 * torch.xlogy(p, p).sum()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(expected, exact)[0], rtol=1e-2, atol=1e-3, check_dtype=False
    )
    assert (gradient[mask] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_class_only_the_teacher_rules_out_has_no_mass_to_follow(temperature):
    student, teacher, labels, _ = make_problem(5)
    teacher[:, 3] = teacher[:, 8] = -torch.inf
    p = softmax(teacher / temperature, 1)
    log_q = log_softmax(student / temperature, 1)
    expected = temperature**2 * (torch.xlogy(p, p) - p * log_q).sum(1).mean()
    out = distillation_from_logits(student, labels, DenseTargets(teacher), alpha=1.0, temperature=temperature)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (out.loss, expected)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("sparse", [False, True])
def test_forward_kl_is_infinite_where_the_student_rules_out_what_the_teacher_does_not(temperature, sparse):
    student, teacher, labels, _ = make_problem(6)
    ruled_out = int(teacher[2].argmax())
    labels[2] = teacher[2].argmin()
    logits = student.detach().clone()
    logits[2, ruled_out] = -torch.inf
    probs, ids = softmax(teacher / temperature, 1).topk(4, dim=1)
    known = (torch.zeros(len(ids)).double(),) * 2
    targets = SparseTargets(ids, probs, "bucket", *known, temperature) if sparse else DenseTargets(teacher)
    options = {"temperature": temperature, "chunk_tokens": 1}
    half = distillation_from_logits(logits.requires_grad_(), labels, targets, alpha=0.5, **options)
    assert half.loss == torch.inf and half.ce.isfinite()
    assert torch.autograd.grad(half.loss, logits)[0].isfinite().all()
    # Without weight it costs nothing; a label that is ruled out is infinite in the same way.
    none = distillation_from_logits(logits, labels, targets, alpha=0.0, **options)
    torch.testing.assert_close(none.loss, cross_entropy(logits, labels))
    labels[2] = ruled_out
    assert distillation_from_logits(logits, labels, targets, alpha=0.0, **options).loss == torch.inf


def test_nan_logits_stay_nan():
    student, teacher, labels, _ = make_problem(7)
    logits = student.detach().clone()
    logits[1, 2] = torch.nan
    assert distillation_from_logits(logits, labels, DenseTargets(teacher), alpha=0.5).loss.isnan()


def test_the_fused_loss_reads_teachers_with_a_padded_vocabulary():
    _, teacher, labels, _ = make_problem(8)
    hidden = torch.randn(len(labels), 5, dtype=torch.float64).requires_grad_()
    head = torch.randn(V, 5, dtype=torch.float64).requires_grad_()
    teacher[:, V - PADDING :] = -torch.inf
    labels.clamp_max_(V - PADDING - 1)
    out = fused_linear_distillation(hidden, head, labels, DenseTargets(teacher), alpha=0.8)
    narrow = LinearTargets(teacher[:, : V - PADDING], torch.eye(V - PADDING, dtype=torch.float64))
    same = fused_linear_distillation(hidden, head, labels, narrow, alpha=0.8)
    torch.testing.assert_close(out.loss, same.loss)
    assert out.stats_ST[STATS.index("teacher_ce")].isfinite().all()
    for mine, theirs in zip(*(torch.autograd.grad(x.loss, (hidden, head)) for x in (out, same)), strict=True):
        torch.testing.assert_close(mine, theirs)
