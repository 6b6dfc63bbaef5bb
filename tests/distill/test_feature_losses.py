"""Hidden-state, attention-relation and router losses against float64 maths.

pytest tests/distill/test_feature_losses.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from distill.losses.attention_relations import relation_divergence
from distill.losses.hidden_states import hidden_state_distance
from distill.losses.router import even_expert_map, listed_expert_map, router_divergence

MEASURES = ("mse", "normalised_mse", "cosine")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("measure", MEASURES)
def test_hidden_states_projected_by_the_identity_are_at_distance_zero(measure):
    hidden_TH, identity = draw(5, 8), torch.eye(8, dtype=torch.float64)
    assert hidden_state_distance(hidden_TH @ identity.T, hidden_TH, measure).abs().max() < 1e-12


@pytest.mark.parametrize("measure", MEASURES)
def test_hidden_state_gradients_reach_state_and_projection_and_never_the_teacher(measure):
    hidden_TH, weight_GH = draw(4, 3).requires_grad_(), draw(6, 3, seed=1).requires_grad_()
    teacher_TG = draw(4, 6, seed=2).requires_grad_()
    distance = lambda hidden, weight: hidden_state_distance(hidden @ weight.T, teacher_TG, measure)  # noqa: E731
    assert torch.autograd.gradcheck(distance, (hidden_TH, weight_GH))
    distance(hidden_TH, weight_GH).sum().backward()
    assert teacher_TG.grad is None


def test_hidden_state_distances_are_their_definitions():
    student, teacher = draw(7, 5), draw(7, 5, seed=1)
    difference = student - teacher
    expected = {
        "mse": difference.pow(2).mean(1),
        "normalised_mse": difference.norm(dim=1) ** 2 / teacher.norm(dim=1) ** 2,
        "cosine": 1 - torch.linalg.vecdot(student, teacher) / (student.norm(dim=1) * teacher.norm(dim=1)),
    }
    for measure, distance_T in expected.items():
        torch.testing.assert_close(hidden_state_distance(student, teacher, measure), distance_T)


def test_measures_differ_in_what_they_say_of_scale():
    student, teacher = draw(7, 5), draw(7, 5, seed=1)
    scaled = [hidden_state_distance(3 * student, 3 * teacher, measure) for measure in MEASURES]
    plain = [hidden_state_distance(student, teacher, measure) for measure in MEASURES]
    torch.testing.assert_close(scaled[0], 9 * plain[0])
    torch.testing.assert_close(scaled[1], plain[1])
    torch.testing.assert_close(hidden_state_distance(3 * student, teacher, "cosine"), plain[2])


def relations(vectors_BTX, heads):
    """log A [B, R, T, T] from the definition, rows over the tokens up to their own."""
    parts = vectors_BTX.unflatten(2, (heads, -1)).transpose(1, 2)
    scores = parts @ parts.mT / parts.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).log_softmax(-1)


def reference_relation_divergence(student, teacher, valid_BT, heads):
    log_q, log_p = relations(student, heads), relations(teacher, heads)
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
    return (terms.sum(-1).mean(1) * valid_BT).sum()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    heads=st.sampled_from([1, 2, 4]),
    widths=st.sampled_from([(8, 8), (8, 24), (24, 4)]),
    chunk=st.integers(1, 9),
)
def test_relation_value_and_gradient_equal_float64_autograd_at_any_chunk_width_and_head_count(
    seed, heads, widths, chunk
):
    student = draw(2, 7, widths[0], seed=seed).requires_grad_()
    teacher, valid = draw(2, 7, widths[1], seed=seed + 1), draw(2, 7, seed=seed + 2) > -0.5
    expected = reference_relation_divergence(student, teacher, valid, heads)
    loss = relation_divergence(student, teacher, valid, heads=heads, chunk_rows=chunk)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert loss >= -1e-12
    gradients = [torch.autograd.grad(2.5 * value, student)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_relations_of_the_same_vectors_are_at_divergence_zero_without_gradient():
    vectors, valid = draw(2, 6, 8).requires_grad_(), torch.ones(2, 6, dtype=torch.bool)
    loss = relation_divergence(vectors, vectors.detach(), valid, heads=4)
    assert abs(loss.item()) < 1e-12
    assert torch.autograd.grad(loss, vectors)[0].abs().max() < 1e-12


def test_relations_do_not_see_rotations_within_a_head_nor_the_order_of_tokens_to_come():
    student, teacher, valid = draw(2, 6, 12), draw(2, 6, 8, seed=1), torch.ones(2, 6, dtype=torch.bool)
    loss = relation_divergence(student, teacher, valid, heads=4)
    rotations = torch.linalg.qr(draw(4, 3, 3, seed=2)).Q
    rotated = (student.unflatten(2, (4, 3)).unsqueeze(-2) @ rotations).flatten(2)
    torch.testing.assert_close(relation_divergence(rotated, teacher, valid, heads=4), loss)
    early = valid.clone()
    early[:, 3:] = False
    order = [0, 1, 2, 5, 3, 4]
    before = relation_divergence(student, teacher, early, heads=4)
    torch.testing.assert_close(relation_divergence(student[:, order], teacher, early, heads=4), before)


def test_relation_gradients_pass_gradcheck():
    student, teacher = draw(1, 5, 6).requires_grad_(), draw(1, 5, 4, seed=1)
    valid = torch.tensor([[True, True, False, True, True]])
    assert torch.autograd.gradcheck(lambda x: relation_divergence(x, teacher, valid, heads=2, chunk_rows=2), (student,))


def test_router_divergence_is_scipys_kl_of_the_mapped_teacher():
    student, teacher, map_FE = draw(6, 3), draw(6, 7, seed=1), even_expert_map(7, 3).double()
    expected = rel_entr(softmax(teacher.numpy(), 1) @ map_FE.numpy(), softmax(student.numpy(), 1)).sum(1)
    torch.testing.assert_close(router_divergence(student, teacher, map_FE), torch.from_numpy(expected))


def test_a_router_equal_to_the_mapped_teacher_is_at_divergence_zero():
    teacher = draw(6, 8)
    torch.testing.assert_close(router_divergence(teacher, teacher, even_expert_map(8, 8)), torch.zeros(6).double())
    map_FE = even_expert_map(8, 4).double()
    mapped = (teacher.softmax(1) @ map_FE).log()
    assert router_divergence(mapped, teacher, map_FE).abs().max() < 1e-12


def test_router_gradients_reach_the_student_and_a_learned_map():
    student, logits_FE = draw(5, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_()
    teacher = draw(5, 4, seed=2).requires_grad_()
    divergence = lambda router, logits: router_divergence(router, teacher, logits.softmax(1))  # noqa: E731
    assert torch.autograd.gradcheck(divergence, (student, logits_FE))
    divergence(student, logits_FE).sum().backward()
    assert teacher.grad is None


@given(teacher=st.integers(1, 20), student=st.integers(1, 20))
def test_an_even_map_keeps_probability_and_loads_student_experts_alike(teacher, student):
    map_FE = even_expert_map(teacher, student)
    torch.testing.assert_close(map_FE.sum(1), torch.ones(teacher))
    torch.testing.assert_close(map_FE.sum(0), torch.full((student,), teacher / student))
    if teacher == student:
        torch.testing.assert_close(map_FE, torch.eye(teacher))


def test_a_listed_map_hands_experts_over_whole():
    assert listed_expert_map([1, 0, 1], 2).tolist() == [[0, 1], [1, 0], [0, 1]]
