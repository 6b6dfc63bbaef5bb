"""The default weight against its definition. Run: pytest tests/distill/test_maturity.py"""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from distill import weighting
from distill.losses import DenseTargets, distillation_from_logits
from distill.tally import Tally
from distill.weighting import StepStats
from distill.weighting.growing_mean import GrowingMean, fall
from herd.run.weighting import Weighting


def make(**fields):
    return weighting.build(TypeAdapter(Weighting).validate_python({"kind": "maturity"} | fields), steps=100)


def alpha_of(design):
    logits_TV = torch.zeros(1, 4)
    loss = distillation_from_logits(
        logits_TV, torch.zeros(1, dtype=torch.long), DenseTargets(logits_TV), alpha=design.alpha
    )
    tally = Tally(top_k=1)
    tally.add(loss.stats_ST, torch.ones(1, dtype=torch.bool), [])
    return tally.step_stats(0).alpha


def learn(design, student, teacher, *, trust=1.0):
    """alpha after each step of these curves, the advantage being this share of the divergence."""
    alphas = []
    for step, (ce, target) in enumerate(zip(student, teacher, strict=True)):
        divergence = abs(ce - target) / trust
        design.update(StepStats(step=step, student_ce=ce, teacher_ce=target, divergence=divergence))
        alphas.append(alpha_of(design))
    return alphas


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=60), power=st.integers(1, 9))
def test_a_growing_mean_weighs_each_step_by_a_power_of_its_place(values, power):
    mean = GrowingMean(power)
    for value in values:
        mean.add(value)
    places = range(1, len(values) + 1)
    # (s - 1)! / (s - power)!, the power of the place in whole numbers; the first `power` steps only know the last value
    weights = [math.prod(range(place - power + 1, place)) if place >= power else 0 for place in places]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights) if any(weights) else values[-1]
    assert mean.value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("steps", [300, 3000])
def test_two_means_tell_by_how_much_a_curve_falls_while_its_steps_grow_by_e(steps):
    fast, slow = GrowingMean(8), GrowingMean(2)
    for step in range(1, steps + 1):
        for mean in (fast, slow):
            mean.add(9.0 - 0.7 * math.log(step))
    assert fall(fast, slow) == pytest.approx(0.7, rel=0.02)


def test_a_frozen_teacher_far_ahead_gets_the_peak_from_the_second_step_on():
    alphas = learn(make(peak=0.8), [8.0 - 0.03 * step for step in range(100)], [4.0] * 100)
    assert alphas == pytest.approx([0.8] * 100, abs=1e-7)


@given(gap=st.floats(0.01, 1.0), trust=st.floats(0.05, 1.5))
def test_the_weight_of_a_frozen_teacher_is_the_product_of_both_shares(gap, trust):
    design = make(peak=0.9, scale=0.25, sure=0.8)
    alpha = learn(design, [4.0 + gap] * 3, [4.0] * 3, trust=trust)[-1]
    assert alpha == pytest.approx(0.9 * min(1, (1 + trust) / 1.8) * min(1, gap / 0.25), rel=1e-5)


@given(gap=st.floats(-3.0, 0.0))
def test_a_teacher_that_is_not_ahead_gets_no_weight_at_all(gap):
    assert set(learn(make(), [4.0 + gap] * 5, [4.0] * 5)) == {0.0}


def test_the_same_advantage_counts_less_while_the_teacher_itself_still_learns():
    teacher = [8.0 - 1.0 * math.log(step) for step in range(1, 401)]
    student = [ce + 0.2 for ce in teacher]
    growing = learn(make(), student, teacher)[-1]
    assert growing == pytest.approx(0.9 * 0.2 / (0.25 + 1.0), rel=0.03)
    assert learn(make(), [4.2] * 400, [4.0] * 400)[-1] == pytest.approx(0.9 * 0.2 / 0.25, rel=1e-5)


@pytest.mark.parametrize("towards", [0.3, 0.5, 0.8])
def test_half_of_one_plus_trust_is_the_mixture_of_both_that_predicts_labels_best(towards):
    generator = torch.Generator().manual_seed(0)
    student_V = torch.randn(400, generator=generator, dtype=torch.float64)
    teacher_V = student_V + 0.1 * torch.randn(400, generator=generator, dtype=torch.float64)
    q_V, p_V = student_V.softmax(0), teacher_V.softmax(0)
    truth_V = (1 - towards) * q_V + towards * p_V
    design = make()
    design.update(
        StepStats(
            step=0,
            student_ce=-(truth_V * q_V.log()).sum().item(),
            teacher_ce=-(truth_V * p_V.log()).sum().item(),
            divergence=(p_V * (p_V / q_V).log()).sum().item(),
        )
    )
    assert (1 + design.trust) / 2 == pytest.approx(towards, abs=0.03)


@given(cut=st.integers(1, 19))
def test_a_restored_weight_goes_on_exactly_as_the_original(cut):
    student = [6.0 - 0.1 * step + 0.3 * (step % 3) for step in range(20)]
    teacher = [5.8 - 0.1 * step + 0.3 * (step % 2) for step in range(20)]
    original, restored = make(), make()
    learn(original, student[:cut], teacher[:cut])
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    rest = (student[cut:], teacher[cut:])
    assert learn(original, *rest) == learn(restored, *rest)
    assert original.metrics() == restored.metrics()
