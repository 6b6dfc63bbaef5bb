"""The soft/hard weights and the learning-rate schedules. Run: pytest tests/distill/test_weighting.py"""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from distill import weighting
from distill.losses.kernel import TokenStats
from distill.schedule import learning_rate
from distill.weighting import StepStats
from herd.run.schema import Optim, Weighting

SETTINGS = [
    {"kind": "constant", "alpha": 0.3},
    {"kind": "schedule", "shape": "cosine", "start": 0.1, "end": 0.8, "begin": 0.2, "until": 0.7},
    {"kind": "lead", "peak": 0.9, "margin": 0.1, "width": 0.2, "noise": 0.05, "horizon": 0.05},
]


def make(settings, steps=100):
    return weighting.build(TypeAdapter(Weighting).validate_python(settings), steps=steps)


def tokens(count=5):
    return TokenStats(*(torch.rand(3, count) * 5))


def follow(weight, gaps):
    """alpha after each of these steps, the teacher being `gap` nats ahead."""
    alphas = []
    for step, gap in enumerate(gaps):
        weight.update(StepStats(step=step, student_ce=4.0 + gap, teacher_ce=4.0))
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


def learn(weight, student, teacher):
    """alpha after each step of these two curves."""
    alphas = []
    for step, (ce, target) in enumerate(zip(student, teacher, strict=True)):
        weight.update(StepStats(step=step, student_ce=ce, teacher_ce=target))
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


def test_a_student_that_has_stopped_learning_listens_to_any_better_teacher():
    alphas = learn(make(SETTINGS[2]), [5.0] * 50, [4.9] * 50)
    assert alphas[-1] == pytest.approx(0.9)


def test_the_lead_of_straight_curves_is_the_steps_between_them():
    weight = make(SETTINGS[2], steps=100)
    learn(weight, [9.0 - 0.02 * step for step in range(60)], [9.0 - 0.02 * (step + 25) for step in range(60)])
    assert weight.gap == pytest.approx(0.5)
    assert weight.rate == pytest.approx(0.02)
    assert weight.lead == pytest.approx(0.25)


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
