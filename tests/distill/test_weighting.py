"""The soft/hard weights and the learning-rate schedules. Run: pytest tests/distill/test_weighting.py"""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from distill import weighting
from distill.losses import distillation_from_logits
from distill.losses.kernel import STATS
from distill.losses.token_stats import GradientProducts, TokenStats
from distill.schedule import learning_rate
from distill.weighting import StepStats
from herd.run.schema import Optim, Weighting
from teachers.targets import DenseTargets

SETTINGS = [
    {"kind": "constant", "alpha": 0.3},
    {"kind": "schedule", "shape": "cosine", "start": 0.1, "end": 0.8, "begin": 0.2, "until": 0.7},
    {"kind": "lead", "peak": 0.9, "margin": 0.1, "width": 0.2, "noise": 0.05, "horizon": 0.05},
]


def make(settings, steps=100):
    return weighting.build(TypeAdapter(Weighting).validate_python(settings), steps=steps)


def tokens(count=5):
    student_ce, teacher_ce, kl, entropy = torch.rand(4, count) * 5
    peak = torch.exp(-entropy)
    products = GradientProducts(torch.rand(count), torch.rand(count), torch.rand(count) / 2)
    return TokenStats(student_ce, teacher_ce, kl, entropy, peak, 17, peak.square, lambda: products)


def follow(weight, gaps):
    """alpha after each of these steps, the teacher being `gap` nats ahead and as far away as that."""
    alphas = []
    for step, gap in enumerate(gaps):
        weight.update(StepStats(step=step, student_ce=4.0 + gap, teacher_ce=4.0, divergence=abs(gap)))
        alphas.append(weight.alpha(tokens())[0].item())
    return alphas


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["kind"])
@given(gaps=st.lists(st.floats(-3, 3), min_size=1, max_size=30))
def test_alpha_is_always_between_zero_and_one(settings, gaps):
    assert all(0.0 <= alpha <= 1.0 for alpha in follow(make(settings), gaps))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["kind"])
def test_a_restored_weight_goes_on_exactly_as_the_original(settings):
    original, restored = make(settings), make(settings)
    follow(original, [0.3, -0.1, 0.2])
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert follow(original, [0.4, 0.1]) == follow(restored, [0.4, 0.1])


def learn(weight, student, teacher, *, trust=1.0):
    """alpha after each step of these two curves, the advantage being this share of the divergence."""
    alphas = []
    for step, (ce, target) in enumerate(zip(student, teacher, strict=True)):
        divergence = abs(ce - target) / trust
        weight.update(StepStats(step=step, student_ce=ce, teacher_ce=target, divergence=divergence))
        alphas.append(weight.alpha(tokens())[0].item())
    return alphas


def test_a_teacher_that_is_never_ahead_gets_no_weight_at_all():
    assert set(follow(make(SETTINGS[2]), [-0.5, 0.0, 0.04, -0.2, 0.05])) == {0.0}


def test_a_teacher_ahead_by_fewer_steps_than_the_margin_gets_no_weight_at_all():
    curve = [8.0 - 0.03 * step for step in range(120)]
    assert set(learn(make(SETTINGS[2]), curve[:100], curve[8:108])) == {0.0}


def test_a_teacher_far_ahead_of_a_learning_student_gets_the_peak():
    curve = [8.0 - 0.03 * step for step in range(100)]
    assert learn(make(SETTINGS[2]), curve, [4.0] * 100)[-1] == pytest.approx(0.9)


def test_a_teacher_with_errors_of_its_own_is_not_followed_however_far_it_is_ahead():
    curve = [8.0 - 0.03 * step for step in range(100)]
    assert set(learn(make(SETTINGS[2]), curve, [4.0] * 100, trust=0.85)) == {0.0}
    assert learn(make(SETTINGS[2]), curve, [4.0] * 100, trust=0.95)[-1] == pytest.approx(0.45)


@pytest.mark.parametrize(("truth", "expected"), [("teacher", 1.0), ("student", None), ("halfway", None)])
def test_trust_is_one_when_labels_are_drawn_from_the_teacher_and_less_when_they_are_not(truth, expected):
    generator = torch.Generator().manual_seed(0)
    student_TV, teacher_TV = torch.randn(2, 4000, 50, generator=generator, dtype=torch.float64)
    p_TV, q_TV = teacher_TV.softmax(1), student_TV.softmax(1)
    labels_TV = {"teacher": p_TV, "student": q_TV, "halfway": (p_TV + q_TV) / 2}[truth]
    labels_T = torch.multinomial(labels_TV, 1, generator=generator).squeeze(1)
    loss = distillation_from_logits(student_TV, labels_T, DenseTargets(teacher_TV))
    ce, kd, teacher_ce = (loss.stats_ST[STATS.index(name)].mean().item() for name in ("ce", "kd", "teacher_ce"))
    weight = make(SETTINGS[2])
    weight.update(StepStats(step=0, student_ce=ce, teacher_ce=teacher_ce, divergence=kd))
    if expected is None:
        assert weight.trust < 0.5
    else:
        ratio_T = (p_TV.log() - q_TV.log()).gather(1, labels_T[:, None]).squeeze(1)
        sigma = ratio_T.std().item() / len(ratio_T) ** 0.5 / kd
        assert weight.trust == pytest.approx(expected, abs=4 * sigma)


def test_a_student_that_has_stopped_learning_listens_to_any_better_teacher():
    alphas = learn(make(SETTINGS[2]), [5.0] * 50, [4.9] * 50)
    assert alphas[-1] == pytest.approx(0.9)


def test_the_lead_of_straight_curves_is_the_steps_between_them():
    weight = make(SETTINGS[2], steps=100)
    learn(weight, [9.0 - 0.02 * step for step in range(60)], [9.0 - 0.02 * (step + 25) for step in range(60)])
    assert weight.gap == pytest.approx(0.5)
    assert weight.rate == pytest.approx(0.02)
    assert weight.lead == pytest.approx(0.25)


def test_steps_without_targets_count_as_time():
    leads = []
    for every in (1, 2, 4):
        weight = make({"kind": "lead", "horizon": 0.1}, steps=400)
        for step in range(0, 200):
            if step % every:
                weight.pass_over(step)
            else:
                learn(weight, [6 - 0.004 * step], [5.5 - 0.004 * step])
        leads.append(weight.rate)
    assert leads == pytest.approx([0.004] * 3)


def test_the_running_gap_is_the_bias_corrected_exponential_mean():
    weight, gaps = make(SETTINGS[2]), [0.5, -0.2, 0.3]
    follow(weight, gaps)
    powers = [0.8**2, 0.8, 1.0]
    assert weight.gap == pytest.approx(sum(p * g for p, g in zip(powers, gaps, strict=True)) / sum(powers))


def test_a_schedule_reaches_its_ends_and_moves_only_between_them():
    weight = make(SETTINGS[1])
    assert weight.value(0) == weight.value(20) == 0.1
    assert weight.value(70) == weight.value(100) == pytest.approx(0.8)
    assert weight.value(45) == pytest.approx(0.45)
    staged = make({"kind": "schedule", "shape": "staged", "start": 1.0, "end": 0.0, "until": 0.5})
    assert [staged.value(step) for step in (0, 49, 50, 99)] == [1.0, 1.0, 0.0, 0.0]


@given(
    schedule=st.sampled_from(["wsd", "cosine", "constant"]),
    steps=st.integers(1, 500),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_learning_rate_is_positive_never_above_its_peak_and_rises_then_falls(schedule, steps, warmup, decay):
    optim = Optim(schedule=schedule, warmup=warmup, decay=decay)
    rates = [learning_rate(optim, step, steps=steps, peak=1e-3) for step in range(steps)]
    top = rates.index(max(rates))
    assert min(rates) > 0 and max(rates) <= 1e-3 * (1 + 1e-12)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert all(b <= a + 1e-15 for a, b in zip(rates[top:], rates[top + 1 :], strict=False))


def test_wsd_holds_its_peak_and_ends_at_the_final_rate():
    optim = Optim(schedule="wsd", warmup=0.1, decay=0.2, final_lr=0.1)
    rates = [learning_rate(optim, step, steps=100, peak=1.0) for step in range(100)]
    assert rates[9:80] == [1.0] * 71 and rates[0] == pytest.approx(0.1)
    assert rates[99] == pytest.approx(0.1) and rates[89] == pytest.approx(0.55)
