"""The chunked loss against plain float64 autograd, and its properties. Run: pytest tests/distill/test_losses.py"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import DenseTargets, LinearTargets, distillation_from_logits, fused_linear_distillation
from distill.losses.kernel import STATS
from herd.run.errors import ConfigError


def make_problem(seed=0, tokens=13, width=8, vocabulary=17, teacher_width=6, teacher_vocabulary=None):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, head = draw(tokens, width).requires_grad_(), draw(vocabulary, width).requires_grad_()
    teacher = LinearTargets(draw(tokens, teacher_width), draw(teacher_vocabulary or vocabulary, teacher_width))
    labels = torch.randint(0, min(vocabulary, teacher_vocabulary or vocabulary), (tokens,), generator=generator)
    labels[2] = labels[7] = -100
    return hidden, head, labels, teacher


def reference_loss(hidden, head, labels, teacher, alpha, temperature):
    """Written from the definition, all [T, V] tensors alive, differentiated by autograd."""
    logits, valid = hidden @ head.T, labels != -100
    ce = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    p = torch.softmax(teacher.hidden_TG @ teacher.head_VG.T / temperature, -1)
    p = torch.nn.functional.pad(p[:, : logits.shape[1]], (0, max(0, logits.shape[1] - p.shape[1])))
    log_q = torch.log_softmax(logits / temperature, -1)
    kd = (torch.xlogy(p, p) - p * log_q).sum(-1)
    alpha = torch.as_tensor(alpha, dtype=torch.float64).expand(len(labels))
    return (((1 - alpha) * ce + alpha * temperature**2 * kd) * valid).sum() / valid.sum()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    alpha=st.floats(0, 1),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    chunk=st.integers(1, 20),
    vocabularies=st.sampled_from([(17, 17), (20, 17)]),
)
def test_value_and_gradients_equal_float64_autograd(seed, alpha, temperature, chunk, vocabularies):
    hidden, head, labels, teacher = make_problem(seed, vocabulary=vocabularies[0], teacher_vocabulary=vocabularies[1])
    expected = reference_loss(hidden, head, labels, teacher, alpha, temperature)
    expected_gradients = torch.autograd.grad(expected, (hidden, head))
    out = fused_linear_distillation(
        hidden, head, labels, teacher, alpha=alpha, temperature=temperature, chunk_tokens=chunk
    )
    gradients = torch.autograd.grad(out.loss, (hidden, head))
    torch.testing.assert_close(out.loss, expected, rtol=1e-11, atol=1e-12)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_every_path_gives_the_same_loss_and_gradient():
    hidden, head, labels, teacher = make_problem(3)
    dense = DenseTargets(teacher.hidden_TG @ teacher.head_VG.T)
    logits = hidden @ head.T
    fused = fused_linear_distillation(hidden, head, labels, teacher, alpha=0.3, temperature=2.0)
    via_dense = fused_linear_distillation(hidden, head, labels, dense, alpha=0.3, temperature=2.0)
    via_logits = distillation_from_logits(logits, labels, dense, alpha=0.3, temperature=2.0)
    expected = torch.autograd.grad(fused.loss, (hidden, head))
    for other in (via_dense, via_logits):
        torch.testing.assert_close(other.loss, fused.loss, rtol=1e-12, atol=0)
        for mine, theirs in zip(torch.autograd.grad(other.loss, (hidden, head)), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_student_equal_to_teacher_has_zero_divergence_and_zero_soft_gradient():
    hidden, head, labels, _ = make_problem(1)
    twin = LinearTargets(hidden.detach(), head.detach())
    out = fused_linear_distillation(hidden, head, labels, twin, alpha=1.0, temperature=3.0)
    assert abs(out.loss.item()) < 1e-12
    assert max(g.abs().max().item() for g in torch.autograd.grad(out.loss, (hidden, head))) < 1e-12


def test_per_token_alpha_equals_a_function_that_returns_it():
    hidden, head, labels, teacher = make_problem(2)
    alpha = torch.linspace(0, 1, len(labels), dtype=torch.float64)
    expected = reference_loss(hidden, head, labels, teacher, alpha, 1.0)
    given_tensor = fused_linear_distillation(hidden, head, labels, teacher, alpha=alpha, chunk_tokens=4)
    torch.testing.assert_close(given_tensor.loss, expected, rtol=1e-11, atol=0)
    chosen = fused_linear_distillation(
        hidden, head, labels, teacher, alpha=lambda s: torch.sigmoid(s.student_ce - s.teacher_ce), chunk_tokens=4
    )
    again = fused_linear_distillation(
        hidden, head, labels, teacher, alpha=chosen.stats_ST[STATS.index("alpha")], chunk_tokens=13
    )
    torch.testing.assert_close(chosen.loss, again.loss, rtol=1e-12, atol=0)


def test_statistics_are_the_teachers_cross_entropy_and_entropy():
    hidden, head, labels, teacher = make_problem(5)
    out = fused_linear_distillation(hidden, head, labels, teacher, chunk_tokens=5)
    log_p = torch.log_softmax(teacher.hidden_TG @ teacher.head_VG.T, -1)
    valid = (labels != -100).double()
    ce = -log_p.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    torch.testing.assert_close(out.stats_ST[STATS.index("teacher_ce")], ce * valid)
    torch.testing.assert_close(out.stats_ST[STATS.index("teacher_entropy")], -(log_p.exp() * log_p).sum(-1) * valid)


def test_ignored_tokens_get_no_gradient_and_an_all_ignored_batch_gives_zero():
    hidden, head, labels, teacher = make_problem(6)
    out = fused_linear_distillation(hidden, head, labels, teacher)
    gradient = torch.autograd.grad(out.loss, hidden)[0]
    assert gradient[2].abs().max() == 0 and gradient[7].abs().max() == 0
    assert gradient[1].abs().max() > 0 and gradient[8].abs().max() > 0
    nothing = fused_linear_distillation(hidden, head, torch.full_like(labels, -100), teacher)
    assert nothing.loss.item() == 0 and nothing.ce.item() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(nothing.loss, (hidden, head)))


def test_micro_batches_with_a_global_normalizer_add_up_to_the_whole_batch():
    hidden, head, labels, teacher = make_problem(7)
    whole = torch.autograd.grad(fused_linear_distillation(hidden, head, labels, teacher).loss, head)[0]
    valid = (labels != -100).sum()
    parts = 0
    for rows in (slice(0, 3), slice(3, 9), slice(9, 13)):
        targets = LinearTargets(teacher.hidden_TG[rows], teacher.head_VG)
        out = fused_linear_distillation(hidden[rows], head, labels[rows], targets, normalizer=valid)
        parts = parts + torch.autograd.grad(out.loss, head)[0]
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("normalizer", [0.25, 1.0, 3.0])
def test_a_normalizer_divides_the_loss_whatever_its_size(normalizer):
    hidden, head, labels, teacher = make_problem(7)
    summed = fused_linear_distillation(hidden, head, labels, teacher, normalizer=1.0).loss
    scaled = fused_linear_distillation(hidden, head, labels, teacher, normalizer=normalizer).loss
    torch.testing.assert_close(scaled, summed / normalizer)


def test_gradients_scale_with_the_gradient_that_arrives():
    hidden, head, labels, teacher = make_problem(8)
    once = torch.autograd.grad(fused_linear_distillation(hidden, head, labels, teacher).loss, hidden)[0]
    scaled = torch.autograd.grad(2.5 * fused_linear_distillation(hidden, head, labels, teacher).loss, hidden)[0]
    torch.testing.assert_close(scaled, 2.5 * once)


def test_bf16_inputs_stay_close_to_float64():
    hidden, head, labels, teacher = make_problem(9, tokens=64, width=32, vocabulary=128)
    expected = reference_loss(hidden, head, labels, teacher, 0.5, 1.0)
    expected_gradient = torch.autograd.grad(expected, head)[0]
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, head)]
    targets = LinearTargets(teacher.hidden_TG.bfloat16(), teacher.head_VG.bfloat16())
    out = fused_linear_distillation(*low, labels, targets, alpha=0.5, chunk_tokens=16)
    gradient = torch.autograd.grad(out.loss, low[1])[0].double()
    assert abs(out.loss.item() - expected.item()) / expected.item() < 0.01
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 0.02


def test_no_two_tensors_of_tokens_times_vocabulary_are_ever_alive():
    tokens, vocabulary, width = 512, 2048, 16
    hidden, head, labels, teacher = make_problem(0, tokens=tokens, width=width, vocabulary=vocabulary)
    sizes = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Record():
        fused_linear_distillation(hidden, head, labels, teacher, chunk_tokens=32).loss.backward()
    assert max(sizes) < tokens * vocabulary / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"alpha": 1.5}, "alpha"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, message):
    hidden, head, labels, teacher = make_problem()
    with pytest.raises(ConfigError, match=message):
        fused_linear_distillation(hidden, head, labels, teacher, **change)
