"""On-policy steps of a small herd: what is mixed, who learns from what, what is measured, and resumes to the bit.

pytest tests/distill/test_on_policy.py
"""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.assembly import assemble
from distill.loop import Loop
from distill.objectives.on_policy import OnPolicyHerd, choose_written
from distill.rollouts import write_batches
from herd.run import checkpoints, ranks
from herd.run import config as configuration
from herd.run.errors import ConfigError, NumericalError
from herd.run.tracking import open_tracker

PROMPT = 96  # of 128 tokens: writing is what takes the time
SMALL = ("run.name=t", "teacher.head_start=0", "run.evaluate_every=0", "run.steps=4", "run.checkpoint_every=2")
CONSTANT = "loss.weighting={kind: constant, alpha: 0.5}"


def small_config(folder, *overrides, fraction=None):
    objective = f"objective={{kind: on_policy, fraction: {fraction}, prompt_tokens: {PROMPT}}}"
    written = [] if fraction is None else [objective]
    return configuration.load("configs/smoke.yaml", [*SMALL, f"run.folder={folder}", *written, *overrides])


def build(folder, *overrides, fraction=None):
    config = small_config(folder, *overrides, fraction=fraction)
    return assemble(config, folder), config


def take_steps(parts, config, steps):
    return [parts.herd.take_step(batches_of(parts, config, step), step) for step in steps]


def batches_of(parts, config, step):
    return parts.rows.take(step, rows=config.batch.rows, micro_rows=parts.micro_rows, rank=0, world=1)


def weights(member):
    return {name: tensor.detach().clone() for name, tensor in member.learner.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first | second)


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A process group of one."""
    ranks.initialise()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Two steps of plain distillation: metrics, and the weights of every model after them."""
    parts, config = build(tmp_path_factory.mktemp("plain"), "batch.micro_rows=2")
    metrics = take_steps(parts, config, (0, 1))
    return metrics, {name: weights(member) for name, member in parts.herd.members.items()}


def test_with_fraction_0_every_weight_and_loss_is_that_of_plain_distillation(plain, tmp_path):
    metrics, reference = plain
    parts, config = build(tmp_path, "batch.micro_rows=2", fraction=0)
    assert isinstance(parts.herd, OnPolicyHerd)
    ours = take_steps(parts, config, (0, 1))
    for name, member in parts.herd.members.items():
        assert same(weights(member), reference[name]), name
    for before, now in zip(metrics, ours, strict=True):
        assert {key: now[key] for key in before if "time/" not in key} == {
            key: value for key, value in before.items() if "time/" not in key
        }
    assert ours[0]["student/scout/on_policy/sampled_share"] == 0.0


def test_a_teacher_that_trains_learns_nothing_from_what_students_write(plain, tmp_path):
    metrics, reference = plain
    parts, config = build(tmp_path, "batch.micro_rows=2", fraction=1)
    ours = take_steps(parts, config, (0, 1))
    assert same(weights(parts.herd.teacher), reference["teacher"])
    assert [step["teacher/ce"] for step in ours] == [step["teacher/ce"] for step in metrics]
    assert not same(weights(parts.herd.pupils["scout"].member), reference["scout"])
    assert ours[0]["student/scout/on_policy/sampled_share"] == 1.0
    assert "student/scout/ce" not in ours[0] and "experts/scout/entropy" in ours[0]


def test_half_of_two_micro_batches_is_one_and_the_shares_are_of_tokens(tmp_path):
    parts, config = build(tmp_path, "batch.micro_rows=2", fraction=0.5)
    metrics = take_steps(parts, config, (0,))[0]
    written, read = 2 * (128 + 1 - PROMPT), 2 * 128
    assert metrics["student/scout/on_policy/sampled_share"] == pytest.approx(written / (written + read))
    assert metrics["student/maverick/ce"] > 0 and metrics["student/maverick/on_policy/kd"] > 0


def test_the_metrics_are_those_of_the_rows_written_computed_from_whole_logits(tmp_path):
    parts, config = build(tmp_path, "run.precision=fp32", "loss.divergence=reverse_kl", fraction=1)
    student, teacher = parts.herd.pupils["scout"].member, parts.herd.teacher
    settings = {"vocabulary": len(parts.tokenizer), "seed": (config.run.seed, 0)}
    (own,) = write_batches(student.learner.model, batches_of(parts, config, 0), config.objective, **settings)
    valid = own.labels_BT != -100
    with torch.no_grad():
        logs = [m.learner.model(input_ids=own.input_ids_BT).logits.double().log_softmax(-1) for m in (student, teacher)]
    picked = [log.gather(-1, own.labels_BT.clamp_min(0)[..., None]).squeeze(-1)[valid] for log in logs]
    metrics = take_steps(parts, config, (0,))[0]
    label = "student/scout/on_policy"
    assert metrics[f"{label}/teacher_logprob"] == pytest.approx(picked[1].mean().item(), abs=1e-5)
    assert metrics[f"{label}/reverse_kl"] == pytest.approx((picked[0] - picked[1]).mean().item(), abs=1e-5)
    exact = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)[valid].mean().item()
    assert metrics[f"{label}/kd"] == pytest.approx(exact, abs=1e-5)
    assert metrics[f"{label}/tokens_per_s"] > 0


def test_a_weighting_learns_from_rows_read_alone(tmp_path):
    parts, config = build(tmp_path, fraction=1)
    state = parts.herd.pupils["scout"].weighting.state_dict()
    take_steps(parts, config, (0,))
    assert parts.herd.pupils["scout"].weighting.state_dict() == state


def test_a_frozen_teacher_scores_rows_too_and_is_not_asked_about_those_that_are_not_learnt(tmp_path):
    parts, config = build(tmp_path, "teacher.mode=frozen", "batch.micro_rows=2", fraction=1)
    seen = []
    handle = parts.herd.teacher.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    take_steps(parts, config, (0,))
    handle.remove()
    read = [batch.input_ids_BT for batch in batches_of(parts, config, 0)]
    assert len(seen) == 2 * len(config.students)
    assert not any(torch.equal(ids, rows) for ids in seen for rows in read)


def test_no_student_writes_during_the_teachers_head_start(tmp_path):
    parts, config = build(tmp_path, "teacher.head_start=1", fraction=1)
    first, second = take_steps(parts, config, (0, 1))
    assert not [key for key in first if "on_policy" in key]
    assert second["student/scout/on_policy/sampled_share"] == 1.0


def test_a_student_that_holds_nan_is_named_though_it_writes_before_it_learns(tmp_path):
    parts, config = build(tmp_path, fraction=1)
    with torch.no_grad():
        parts.herd.pupils["scout"].member.learner.model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"scout.*layers\.1\.self_attn\.o_proj\.weight holds NaN"):
        take_steps(parts, config, (0,))


def test_a_resumed_run_writes_and_learns_what_an_uninterrupted_one_does_to_the_bit(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    ends = []
    for folder in (whole, resumed):
        folder.mkdir(exist_ok=True)
        parts, config = build(folder, CONSTANT, "batch.micro_rows=2", fraction=0.5)
        tracker = open_tracker(folder, experiment="t", run_name="t", enabled=False)
        start = folder / "start" if folder is resumed else None
        Loop(parts, config, folder, tracker).run(resume_from=start, resume_command="")
        ends.append({name: weights(member) for name, member in parts.herd.members.items()})
        if folder is whole:
            oldest = checkpoints.all_complete(whole)[0]
            assert checkpoints.step_of(oldest) == 2
            shutil.copytree(oldest, resumed / "start")
            torch.rand(7)  # the global stream must not matter
    for name in ends[0]:
        assert same(ends[0][name], ends[1][name]), name


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31 - 1), st.integers(0, 10_000))
def test_the_micro_batches_written_are_the_asked_share_to_within_one(count, fraction, seed, step):
    chosen = choose_written(count, fraction, seed=(seed, step))
    assert chosen == choose_written(count, fraction, seed=(seed, step))
    assert len(set(chosen)) == len(chosen) and set(chosen) <= set(range(count))
    assert abs(len(chosen) - fraction * count) < 1


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.3), (5, 0.5)])
def test_over_many_steps_the_share_is_exact_on_average_and_every_place_has_its_turn(count, fraction):
    chosen = [choose_written(count, fraction, seed=(0, step)) for step in range(2000)]
    shares = torch.tensor([[index in one for index in range(count)] for one in chosen]).double().mean(0)
    assert (shares - fraction).abs().max() < 5 * (fraction * (1 - fraction) / 2000) ** 0.5


@pytest.mark.parametrize(
    ("objective", "others", "words"),
    [
        ("{kind: on_policy, prompt_tokens: 128}", (), "objective.prompt_tokens = 128: leaves nothing to write"),
        ("{kind: on_policy}", ("teacher.mode=none",), "with teacher.mode = none nothing can score"),
        ("{kind: on_policy, fraction: 1.5}", (), "objective.fraction = 1.5"),
        ("{kind: on_policy, fraction: -0.1}", (), "objective.fraction = -0.1"),
        ("{kind: on_policy, sample_temperature: 0}", (), "objective.sample_temperature = 0"),
        ("{kind: on_policy, prompt_tokens: 0}", (), "objective.prompt_tokens = 0"),
        ("{kind: onpolicy}", (), "objective.kind"),
        ("{kind: on_policy}", ("parallel.zero=3", "parallel.expert_parallel=2"), "parallel.zero = 3 with"),
    ],
)
def test_what_cannot_work_is_one_line_with_field_and_value(objective, others, words, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        small_config(tmp_path, f"objective={objective}", *others)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
