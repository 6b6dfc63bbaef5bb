"""Each design of the soft/hard weight against its definition, in float64.

pytest tests/distill/test_weighting_designs.py

Shapes: T tokens, V vocabulary.
"""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy.optimize import minimize_scalar

from distill import weighting
from distill.losses import DenseTargets, SparseTargets, distillation_from_logits
from distill.losses.kernel import STATS
from distill.tally import Tally
from distill.weighting import StepStats, entropy_bins
from herd.run.weighting import Weighting

V = 12
DESIGNS = [
    {"kind": "constant"},
    {"kind": "schedule"},
    {"kind": "lead"},
    {"kind": "maturity"},
    {"kind": "confidence", "measure": "peak"},
    {"kind": "confidence", "measure": "entropy"},
    {"kind": "gate"},
    {"kind": "repair"},
    *({"kind": "gap", "over": over} for over in ("token", "step", "entropy")),
    *({"kind": "gradients", "rule": r, "over": o} for r in ("norms", "mgda", "surgery") for o in ("token", "step")),
    {"kind": "uncertainty"},
    {"kind": "calibration", "reference": "teacher"},
    {"kind": "calibration", "reference": "student"},
    {"kind": "slope"},
]
every_design = pytest.mark.parametrize("settings", DESIGNS, ids=lambda s: "-".join(map(str, s.values())))
seeds = st.integers(0, 10_000)
few = examples(max_examples=4, deadline=None)
more = examples(max_examples=15, deadline=None)


def make(steps=20, **settings):
    return weighting.build(TypeAdapter(Weighting).validate_python(settings), steps=steps)


def draw(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(p_TV, seed):
    return torch.multinomial(p_TV, 1, generator=torch.Generator().manual_seed(7_000_000 + seed)).squeeze(1)


def sparse(teacher_TV, labels_T, form, seed=0):
    """What a cache would keep of these logits."""
    p_TV = teacher_TV.softmax(1)
    entropy_T, ce_T = -(p_TV * p_TV.log()).sum(1), -p_TV.log().gather(1, labels_T[:, None]).squeeze(1)
    if form == "bucket":
        probs_TK, ids_TK = p_TV.topk(5, dim=1)
        return SparseTargets(ids_TK, probs_TK, "bucket", entropy_T, ce_T)
    draws_TK = torch.multinomial(p_TV, 8, replacement=True, generator=torch.Generator().manual_seed(seed))
    counts_TV = torch.zeros_like(p_TV).scatter_add_(1, draws_TK, torch.ones_like(draws_TK, dtype=p_TV.dtype))
    probs_TK, ids_TK = counts_TV.topk(8, dim=1)
    return SparseTargets(torch.where(probs_TK > 0, ids_TK, -1), probs_TK / 8, "sampled", entropy_T, ce_T)


def targets_of(teacher_TV, labels_T, form):
    return DenseTargets(teacher_TV) if form == "dense" else sparse(teacher_TV, labels_T, form)


def take_step(design, step, student_TV, teacher_TV, labels_T, form="dense"):
    """One step as the trainer takes it; the alpha of each token."""
    loss = distillation_from_logits(
        student_TV,
        labels_T,
        targets_of(teacher_TV, labels_T, form),
        alpha=design.alpha,
        chunk_tokens=len(labels_T) // 2,
    )
    tally = Tally(top_k=1)
    tally.add(loss.stats_ST, labels_T != -100, [])
    design.update(tally.step_stats(step))
    return loss.stats_ST[STATS.index("alpha")]


def follow(design, seed, *, form="dense", steps=4, start=0):
    """Alphas of some steps with a teacher that is better than the student."""
    alphas = []
    for step in range(start, start + steps):
        truth_TV = draw(seed + 3 * step, 20, V, scale=2.0)
        student_TV, teacher_TV = truth_TV * 0.3, truth_TV + draw(seed + 3 * step + 1, 20, V, scale=0.3)
        labels_T = sample(truth_TV.softmax(1), seed + step)
        alphas.append(take_step(design, step, student_TV, teacher_TV, labels_T, form))
        design.see_heldout(step + 1, 4.0 / (step + 1))
    return torch.stack(alphas)


@every_design
@pytest.mark.parametrize("form", ["dense", "bucket", "sampled"])
@few
@given(seed=seeds)
def test_alpha_is_in_its_bounds_with_every_form_of_target(settings, form, seed):
    alphas = follow(make(**settings), seed, form=form)
    assert alphas.dtype == torch.float64
    assert ((alphas >= 0) & (alphas <= 1)).all()


@every_design
@few
@given(seed=seeds)
def test_a_design_restored_from_json_goes_on_bit_for_bit(settings, seed):
    original, restored = make(**settings), make(**settings)
    follow(original, seed, steps=5)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert restored.state_dict() == original.state_dict()
    assert restored.metrics() == original.metrics()
    assert torch.equal(follow(original, seed + 1, start=5), follow(restored, seed + 1, start=5))


@every_design
def test_a_token_without_a_target_is_learnt_from_its_label_and_tells_the_design_nothing(settings):
    teacher_TV, labels_T = draw(1, 20, V, scale=2.0), sample(draw(0, 20, V).softmax(1), 2)
    targets = sparse(teacher_TV, labels_T, "bucket")
    present_T = torch.arange(20) % 3 > 0
    garbage = {
        "probs_TK": targets.probs_TK.clone(),
        "ce_T": targets.ce_T.clone(),
        "entropy_T": targets.entropy_T.clone(),
    }
    for tensor in garbage.values():
        tensor[~present_T] = 0.0
    partial = SparseTargets(targets.ids_TK, tail="bucket", present_T=present_T, **garbage)
    states = []
    for rows, soft in ((slice(None), partial), (present_T, None)):
        design = make(**settings)
        student_TV = draw(3, 20, V)[rows]
        soft = soft or sparse(teacher_TV[rows], labels_T[rows], "bucket")
        loss = distillation_from_logits(student_TV, labels_T[rows], soft, alpha=design.alpha)
        if soft is partial:
            assert (loss.stats_ST[STATS.index("alpha")][~present_T] == 0).all()
        tally = Tally(top_k=1)
        tally.add(loss.stats_ST, torch.ones_like(labels_T[rows], dtype=torch.bool), [])
        design.update(tally.step_stats(0))
        states.append(design.state_dict())
    assert flat(states[0]) == pytest.approx(flat(states[1]), rel=1e-12)


def flat(state):
    if isinstance(state, dict):
        return [x for value in state.values() for x in flat(value)]
    return [x for value in state for x in flat(value)] if isinstance(state, list) else [state]


# B. Confidence and entropy


def test_confidence_is_one_minus_the_peak_and_entropy_its_share_of_the_largest():
    teacher_TV, labels_T = draw(0, 30, V, scale=2.0), torch.zeros(30, dtype=torch.long)
    p_TV = teacher_TV.softmax(1)
    for measure, expected_T in (
        ("peak", 1 - p_TV.amax(1)),
        ("entropy", torch.distributions.Categorical(p_TV).entropy() / math.log(V)),
    ):
        alpha_T = take_step(make(kind="confidence", measure=measure), 0, draw(1, 30, V), teacher_TV, labels_T)
        torch.testing.assert_close(alpha_T, expected_T)


def test_a_uniform_teacher_gets_all_and_a_certain_one_nothing():
    labels_T = torch.zeros(3, dtype=torch.long)
    certain_TV = torch.full((3, V), -1e4, dtype=torch.float64).index_fill_(1, torch.tensor([4]), 0.0)
    design = make(kind="confidence", measure="entropy")
    assert take_step(design, 0, draw(1, 3, V), torch.zeros(3, V).double(), labels_T).tolist() == pytest.approx([1] * 3)
    assert take_step(design, 0, draw(1, 3, V), certain_TV, labels_T).tolist() == [0.0] * 3


# C. Trust in the label


def test_the_gate_is_half_open_at_the_usual_loss_and_follows_the_sigmoid():
    design = make(kind="gate", sharpness=2.0)
    teacher_TV, labels_T = draw(0, 40, V), sample(draw(0, 40, V).softmax(1), 1)
    ce_T = -teacher_TV.log_softmax(1).gather(1, labels_T[:, None]).squeeze(1)
    assert take_step(design, 0, draw(1, 40, V), teacher_TV, labels_T).tolist() == [0.5] * 40
    alpha_T = take_step(design, 1, draw(1, 40, V), teacher_TV, labels_T)
    torch.testing.assert_close(alpha_T, torch.sigmoid(2.0 * (ce_T.mean() - ce_T)))


@more
@given(seed=seeds, margin=st.floats(0.0, 0.9))
def test_repair_gives_the_label_exactly_its_margin_where_the_teacher_is_wrong(seed, margin):
    teacher_TV = draw(seed, 20, V, scale=2.0)
    labels_T = sample(torch.full((20, V), 1 / V), seed)
    alpha_T = take_step(make(kind="repair", margin=margin), 0, draw(seed + 1, 20, V), teacher_TV, labels_T)
    p_TV = teacher_TV.softmax(1)
    label_TV = torch.nn.functional.one_hot(labels_T, V)
    mixed_TV = alpha_T[:, None] * p_TV + (1 - alpha_T[:, None]) * label_TV
    lead_T = mixed_TV.gather(1, labels_T[:, None]).squeeze(1) - mixed_TV.masked_fill(label_TV.bool(), -1).amax(1)
    wrong_T = p_TV.argmax(1) != labels_T
    assert (alpha_T[~wrong_T] == 1).all()
    torch.testing.assert_close(lead_T[wrong_T], torch.full_like(lead_T[wrong_T], margin), atol=1e-9, rtol=0)


# D. Difficulty gap


def test_the_gap_over_tokens_steps_and_bins_is_what_it_says():
    truth_TV = draw(0, 300, V, scale=2.0)
    student_TV, teacher_TV = truth_TV * 0.3, truth_TV
    labels_T = sample(truth_TV.softmax(1), 1)
    log_q_TV, log_p_TV = student_TV.log_softmax(1), teacher_TV.log_softmax(1)
    gap_T = (log_p_TV - log_q_TV).gather(1, labels_T[:, None]).squeeze(1)
    bin_T = entropy_bins.of(-(log_p_TV.exp() * log_p_TV).sum(1))
    alphas = {}
    for over in ("token", "step", "entropy"):
        design = make(kind="gap", over=over, scale=2.0, peak=0.8)
        take_step(design, 0, student_TV, teacher_TV, labels_T)
        alphas[over] = take_step(design, 1, student_TV, teacher_TV, labels_T)
    torch.testing.assert_close(alphas["token"], 0.8 * torch.sigmoid(gap_T / 2))
    torch.testing.assert_close(alphas["step"], torch.full_like(gap_T, 0.4 * gap_T.mean().item()))
    for index in bin_T.unique():
        inside_T = bin_T == index
        lean = 0.005 * len(gap_T)
        mean = (gap_T[inside_T].sum() + lean * gap_T.mean()) / (inside_T.sum() + lean)
        torch.testing.assert_close(
            alphas["entropy"][inside_T], torch.full((int(inside_T.sum()),), 0.4 * mean.item()).double()
        )


@pytest.mark.parametrize("over", ["step", "entropy"])
def test_a_teacher_that_is_behind_gets_nothing_from_the_gap(over):
    design = make(kind="gap", over=over)
    truth_TV = draw(0, 300, V, scale=2.0)
    labels_T = sample(truth_TV.softmax(1), 1)
    for step in range(3):
        alpha_T = take_step(design, step, truth_TV, torch.zeros_like(truth_TV), labels_T)
    assert (alpha_T == 0).all()


# E. Gradients


def gradients_of(student_TV, teacher_TV, labels_T):
    q_TV = student_TV.softmax(1)
    return q_TV - teacher_TV.softmax(1), q_TV - torch.nn.functional.one_hot(labels_T, V)


def mixed(alpha, soft, hard):
    return alpha * soft + (1 - alpha) * hard


@more
@given(seed=seeds)
def test_mgda_takes_the_mix_of_least_norm(seed):
    student_TV, teacher_TV = draw(seed, 6, V), draw(seed + 1, 6, V, scale=3.0)
    labels_T = sample(teacher_TV.softmax(1), seed)
    soft_TV, hard_TV = gradients_of(student_TV, teacher_TV, labels_T)
    alpha_T = take_step(make(kind="gradients", rule="mgda", over="token"), 0, student_TV, teacher_TV, labels_T)
    for alpha, soft, hard in zip(alpha_T.tolist(), soft_TV, hard_TV, strict=True):
        best = minimize_scalar(
            lambda a, u=soft, v=hard: mixed(a, u, v).square().sum().item(), bounds=(0, 1), options={"xatol": 1e-9}
        )
        assert mixed(alpha, soft, hard).square().sum().item() <= best.fun + 1e-9


@more
@given(seed=seeds, kappa=st.floats(0.1, 10.0))
def test_norms_makes_the_soft_part_kappa_times_as_long_as_the_hard_one(seed, kappa):
    student_TV, teacher_TV = draw(seed, 6, V), draw(seed + 1, 6, V, scale=3.0)
    labels_T = sample(teacher_TV.softmax(1), seed)
    soft_TV, hard_TV = gradients_of(student_TV, teacher_TV, labels_T)
    alpha_T = take_step(make(kind="gradients", over="token", kappa=kappa), 0, student_TV, teacher_TV, labels_T)
    torch.testing.assert_close(alpha_T * soft_TV.norm(dim=1), kappa * (1 - alpha_T) * hard_TV.norm(dim=1))


@more
@given(seed=seeds)
def test_surgery_points_where_pcgrad_points(seed):
    student_TV, teacher_TV = draw(seed, 6, V), draw(seed + 1, 6, V, scale=3.0)
    labels_T = sample(torch.full((6, V), 1 / V), seed)  # labels the teacher did not expect: opposed gradients
    soft_TV, hard_TV = gradients_of(student_TV, teacher_TV, labels_T)
    alpha_T = take_step(make(kind="gradients", rule="surgery", over="token"), 0, student_TV, teacher_TV, labels_T)
    for alpha, soft, hard in zip(alpha_T, soft_TV, hard_TV, strict=True):
        against = (soft @ hard).clamp_max(0)
        total = soft - against / (hard @ hard) * hard + hard - against / (soft @ soft) * soft
        ours = mixed(alpha, soft, hard)
        torch.testing.assert_close(ours / ours.norm(), total / total.norm(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("rule", ["norms", "mgda", "surgery"])
@pytest.mark.parametrize("over", ["token", "step"])
def test_a_teacher_that_is_the_label_is_weighted_one_half(rule, over):
    labels_T = torch.arange(6)
    certain_TV = torch.full((6, V), -1e4, dtype=torch.float64).scatter_(1, labels_T[:, None], 0.0)
    design = make(kind="gradients", rule=rule, over=over)
    for step in range(3):
        alpha_T = take_step(design, step, draw(0, 6, V), certain_TV, labels_T)
    torch.testing.assert_close(alpha_T, torch.full_like(alpha_T, 0.5), atol=1e-6, rtol=0)


def test_over_steps_the_mean_squares_decide():
    student_TV, teacher_TV = draw(0, 50, V), draw(1, 50, V, scale=3.0)
    labels_T = sample(teacher_TV.softmax(1), 0)
    soft_TV, hard_TV = gradients_of(student_TV, teacher_TV, labels_T)
    design = make(kind="gradients", rule="norms", over="step")
    take_step(design, 0, student_TV, teacher_TV, labels_T)
    alpha_T = take_step(design, 1, student_TV, teacher_TV, labels_T)
    soft, hard = soft_TV.square().sum().sqrt(), hard_TV.square().sum().sqrt()
    torch.testing.assert_close(alpha_T, (hard / (hard + soft)).expand(50))


# F. Uncertainty


@more
@given(kd=st.floats(0.1, 8.0), ce=st.floats(0.1, 8.0))
def test_uncertainty_rests_where_its_loss_is_least(kd, ce):
    design = make(kind="uncertainty", rate=0.1)
    for step in range(1500):
        design.update(StepStats(step=step, student_ce=ce, distillation=kd))
    soft, hard = design.metrics()["log_variance_soft"], design.metrics()["log_variance_hard"]
    assert soft == pytest.approx(math.log(kd), abs=1e-4) and hard == pytest.approx(math.log(ce), abs=1e-4)
    alpha_T = follow(design, 0, steps=1)[0]
    assert alpha_T[0].item() == pytest.approx(ce / (ce + kd), abs=1e-4)


def test_uncertainty_stays_in_its_bounds_when_the_divergence_vanishes():
    design = make(kind="uncertainty", rate=1.0, bound=2.0)
    for step in range(50):
        design.update(StepStats(step=step, student_ce=100.0, distillation=0.0))
    assert design.state_dict() == {"soft": -2.0, "hard": 2.0}


# G. Calibration


def test_the_identity_behind_the_shrinkage_is_exact_on_a_known_truth():
    truth_TV, teacher_TV = draw(0, 50, V).softmax(1), draw(1, 50, V).softmax(1)
    label_VV = torch.eye(V, dtype=torch.float64)
    distance_TV = (label_VV[None] - teacher_TV[:, None]).square().sum(2)
    expected_T = (truth_TV * distance_TV).sum(1)
    square = lambda x_TV: x_TV.square().sum(1)  # noqa: E731
    torch.testing.assert_close(expected_T, 1 - square(truth_TV) + square(truth_TV - teacher_TV), rtol=1e-13, atol=0)


def test_what_the_student_tells_of_the_teachers_error_is_exact_up_to_what_they_share():
    truth_TV, p_TV, q_TV = (draw(seed, 50, V).softmax(1) for seed in (0, 1, 2))
    label_VV = torch.eye(V, dtype=torch.float64)
    towards_T = ((q_TV - p_TV)[:, None] * (q_TV[:, None] - label_VV[None])).sum(2).mul(truth_TV).sum(1)
    shared_T = ((q_TV - truth_TV) * (p_TV - truth_TV)).sum(1)
    torch.testing.assert_close(towards_T, (q_TV - truth_TV).square().sum(1) - shared_T)
    left_T = (q_TV - p_TV).square().sum(1) - towards_T
    torch.testing.assert_close(left_T, (p_TV - truth_TV).square().sum(1) - shared_T)


CASES = {  # what the teacher says of a truth, given its logits
    "perfect": lambda truth_TV: truth_TV,
    "over-confident": lambda truth_TV: 3.0 * truth_TV,
    "random": lambda truth_TV: draw(99, *truth_TV.shape, scale=2.0),
}


@pytest.mark.parametrize("form", ["dense", "bucket"])
@pytest.mark.parametrize("reference", ["teacher", "student"])
def test_calibration_trusts_a_perfect_teacher_to_the_peak_and_a_wrong_one_less(reference, form):
    alphas = {}
    for name, teacher_of in CASES.items():
        design = make(kind="calibration", reference=reference, peak=0.95)
        for step in range(4):
            truth_TV = draw(step, 4000, V, scale=2.0)
            labels_T = sample(truth_TV.softmax(1), step)
            alpha_T = take_step(design, step, truth_TV * 0.3, teacher_of(truth_TV), labels_T, form)
        alphas[name] = alpha_T.mean().item()
    assert alphas["perfect"] > 0.85
    assert alphas["over-confident"] < 0.85 * alphas["perfect"] and alphas["random"] < 0.8 * alphas["perfect"]
    if reference == "student":
        assert alphas["random"] < 0.3


def test_only_the_student_sees_through_a_calibrated_teacher_that_knows_nothing():
    means = {}
    for reference in ("teacher", "student"):
        design = make(kind="calibration", reference=reference, peak=1.0)
        for step in range(4):
            truth_TV = draw(step, 4000, V, scale=2.0)
            unigram_TV = truth_TV.softmax(1).mean(0).log().expand(4000, V)
            labels_T = sample(truth_TV.softmax(1), step)
            alpha_T = take_step(design, step, truth_TV * 0.8, unigram_TV, labels_T)
        means[reference] = alpha_T.mean().item()
    assert means["teacher"] > 0.9 and means["student"] < 0.1


# H. Held-out slope


@pytest.mark.parametrize(("better", "expected"), [(lambda a: a, 1.0), (lambda a: 1 - a, 0.0)])
def test_the_slope_moves_to_the_side_where_the_heldout_loss_falls_faster(better, expected):
    design = make(kind="slope", start=0.5, probe=0.1, pace=0.1)
    nats, middles = 6.0, []
    for step in range(1, 40):
        nats -= (0.02 + 0.05 * better(design.value)) / (1 + step / 40)  # slower and slower, as every run
        design.see_heldout(10 * step, nats)
        middles.append(design.metrics()["middle"])
    assert middles[:3] == [0.5] * 3
    assert middles[-1] == pytest.approx(expected)
