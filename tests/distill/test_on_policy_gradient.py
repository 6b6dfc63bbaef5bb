"""The gradient of on-policy distillation, by enumerating every row a tiny student could write; all float64.

The student is a table: logits_SV[s] are those after token s. Shapes: S states = V tokens, N tokens of a row.
pytest tests/distill/test_on_policy_gradient.py
"""

from itertools import product

import pytest
import torch

from distill.losses import DenseTargets, distillation_from_logits
from distill.rollouts import draw

VOCABULARY, LENGTH, START = 4, 3, 0
ROWS_RN = torch.tensor(list(product(range(VOCABULARY), repeat=LENGTH)))
STATES_RN = torch.cat([torch.full_like(ROWS_RN[:, :1], START), ROWS_RN[:, :-1]], 1)
DIVERGENCES = ("forward_kl", "reverse_kl")


def tables(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw_table = lambda: torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw_table().requires_grad_(), draw_table()


def divergences(student_SV, teacher_SV, which):
    """[S], by definition, with a graph to the student."""
    log_q, log_p = student_SV.log_softmax(1), teacher_SV.log_softmax(1)
    if which == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(1)
    return (log_q.exp() * (log_q - log_p)).sum(1)


def log_probabilities(student_SV):
    """[R, N]: log q of every token of every row, given the tokens before it."""
    return student_SV.log_softmax(1)[STATES_RN, ROWS_RN]


def k1(student_SV, teacher_SV):
    """[R, N]: log q - log p of the tokens written."""
    return log_probabilities(student_SV) - teacher_SV.log_softmax(1)[STATES_RN, ROWS_RN]


def gradient(value, student_SV):
    (found,) = torch.autograd.grad(value, student_SV)
    return found


def per_token_gradient(student_SV, teacher_SV, which):
    """Of sum_n E_{s_n ~ q}[D(q(.|s_n), p(.|s_n))] with the distribution of the states s_n held fixed, as documented."""
    moves_SV, visits_S = student_SV.detach().softmax(1), torch.eye(VOCABULARY, dtype=torch.float64)[START]
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(LENGTH):
        total = total + visits_S @ divergences(student_SV, teacher_SV, which)
        visits_S = visits_S @ moves_SV
    return gradient(total, student_SV)


def test_the_definition_is_the_expectation_of_k1_differentiated_through_each_token_but_not_through_its_state():
    student_SV, teacher_SV = tables()
    logs_RN = log_probabilities(student_SV)
    reached_RN = torch.cat([torch.zeros_like(logs_RN[:, :1]), logs_RN.cumsum(1)[:, :-1]], 1).detach()
    # Rows that share their first n tokens count together, V^(N - n - 1) of them, all with the same term.
    twins_N = VOCABULARY ** torch.arange(LENGTH - 1, -1, -1, dtype=torch.float64)
    expectation = ((reached_RN + logs_RN).exp() * k1(student_SV, teacher_SV) / twins_N).sum()
    expected = per_token_gradient(student_SV, teacher_SV, "reverse_kl")
    torch.testing.assert_close(gradient(expectation, student_SV), expected, rtol=1e-12, atol=1e-14)


def test_it_is_the_policy_gradient_with_the_advantage_minus_k1_and_no_discounted_future():
    student_SV, teacher_SV = tables()
    logs_RN = log_probabilities(student_SV)
    weights_R = logs_RN.sum(1).exp().detach()
    surrogate = (weights_R[:, None] * logs_RN * k1(student_SV, teacher_SV).detach()).sum()
    expected = per_token_gradient(student_SV, teacher_SV, "reverse_kl")
    torch.testing.assert_close(gradient(surrogate, student_SV), expected, rtol=1e-12, atol=1e-14)


def test_backpropagating_k1_of_the_written_tokens_would_forget_the_teacher():
    student_SV, teacher_SV = tables()
    weights_R = log_probabilities(student_SV).sum(1).exp().detach()
    naive = gradient((weights_R[:, None] * k1(student_SV, teacher_SV)).sum(), student_SV)
    assert naive.abs().max() < 1e-15
    assert per_token_gradient(student_SV, teacher_SV, "reverse_kl").abs().max() > 0.1


def test_the_gradient_of_the_whole_rows_divergence_has_a_further_term_that_is_left_out():
    student_SV, teacher_SV = tables()
    logs_R = log_probabilities(student_SV).sum(1)
    whole = gradient((logs_R.exp() * k1(student_SV, teacher_SV).sum(1)).sum(), student_SV)
    ours = per_token_gradient(student_SV, teacher_SV, "reverse_kl")
    future_RN = k1(student_SV, teacher_SV).detach().flip(1).cumsum(1).flip(1) - k1(student_SV, teacher_SV).detach()
    rest = gradient((logs_R.exp().detach()[:, None] * log_probabilities(student_SV) * future_RN).sum(), student_SV)
    torch.testing.assert_close(whole, ours + rest, rtol=1e-10, atol=1e-13)
    assert rest.abs().max() > 0.01


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_of_written_rows_has_that_gradient_in_expectation(divergence):
    student_SV, teacher_SV = tables()
    weights_R = log_probabilities(student_SV).sum(1).exp().detach()
    total = torch.zeros((), dtype=torch.float64)
    for states_N, row_N, weight in zip(STATES_RN, ROWS_RN, weights_R, strict=True):
        targets = DenseTargets(teacher_SV[states_N])
        settings = {"alpha": 1.0, "normalizer": 1.0, "divergence": divergence}
        total = total + weight * distillation_from_logits(student_SV[states_N], row_N, targets, **settings).loss
    expected = per_token_gradient(student_SV, teacher_SV, divergence)
    torch.testing.assert_close(gradient(total, student_SV), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_that_are_really_drawn_have_it_on_average(divergence):
    count, (student_SV, teacher_SV) = 40_000, tables()
    chances_RN = torch.rand(count, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    written = [torch.full((count,), START)]
    for place in range(LENGTH):
        written.append(draw(student_SV.detach()[written[-1]], chances_RN[:, place], temperature=1.0))
    states_T, ids_T = torch.cat(written[:-1]), torch.cat(written[1:])
    settings = {"alpha": 1.0, "normalizer": float(count), "divergence": divergence}
    loss = distillation_from_logits(student_SV[states_T], ids_T, DenseTargets(teacher_SV[states_T]), **settings).loss
    # A row's gradient at state s is (visits of s) x (gradient of one visit), and it has at most N visits.
    one_visit_SV = gradient(divergences(student_SV, teacher_SV, divergence).sum(), student_SV)
    error_SV = LENGTH * one_visit_SV.abs() / count**0.5
    off_SV = gradient(loss, student_SV) - per_token_gradient(student_SV, teacher_SV, divergence)
    assert (off_SV.abs() <= 5 * error_SV).all()


def test_the_mean_of_k1_over_written_tokens_estimates_the_reverse_divergence():
    count, (student_SV, teacher_SV) = 40_000, tables()
    chances = torch.rand(count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    log_q, log_p = student_SV.detach()[2].log_softmax(0), teacher_SV[2].log_softmax(0)
    ids = draw(student_SV.detach()[2].expand(count, -1), chances, temperature=1.0)
    samples = (log_q - log_p)[ids]
    exact = divergences(student_SV.detach(), teacher_SV, "reverse_kl")[2]
    assert (samples.mean() - exact).abs() < 5 * samples.std() / count**0.5
