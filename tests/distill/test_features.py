"""Feature losses inside the trainer: recorded where transformers says, trained with the student, saved, not exported.

pytest tests/distill/test_features.py
"""

import pytest
import torch
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from distill.assembly import assemble
from distill.features import Lesson, build_features
from distill.learner import Learner
from distill.loop import Loop
from distill.losses import fused_linear_distillation
from distill.losses.hidden_states import hidden_state_distance
from distill.plan import plan_run
from herd.llama4 import build, use_sparse_experts
from herd.run import config as configuration
from herd.run import ranks
from herd.run.comparisons import HiddenFeature, RelationFeature, RouterFeature
from herd.run.errors import ConfigError, NumericalError
from herd.run.tracking import open_tracker
from teachers.recorder import Recorder, places_of

SMALL = ["run.name=t", "teacher.head_start=0", "run.evaluate_every=0", "run.steps=4", "run.checkpoint_every=100"]
ALL = (
    "loss.features=[{kind: hidden, measure: normalised_mse, weight: 0.5}, {kind: relations, heads: 4, weight: 0.2},"
    "{kind: router, weight: 0.3, learned: true}, {kind: router, layers: [[0, 0]], students: [scout]}]"
)
HERD = {"hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 64, "vocab_size": 64}
HIDDEN, RELATIONS, ROUTER = (
    HiddenFeature(kind="hidden"),
    RelationFeature(kind="relations"),
    RouterFeature(kind="router"),
)


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A process group of one."""
    ranks.initialise()


def scout(seed, **overrides):
    return use_sparse_experts(build("scout-nano", overrides={**HERD, "num_local_experts": 4, **overrides}, seed=seed))


def small_llama(**overrides):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **overrides}))


def small_assembly(folder, *overrides):
    config = configuration.load("configs/smoke.yaml", [*SMALL, f"run.folder={folder}", *overrides])
    return assemble(config, folder), config


def take_steps(assembly, config, steps):
    return [assembly.herd.take_step(batches_of(assembly, config, step), step) for step in steps]


def batches_of(assembly, config, step):
    return assembly.rows.take(step, rows=config.batch.rows, micro_rows=assembly.micro_rows, rank=0, world=1)


def one_lesson(student, teacher, *settings):
    """Loss and sums of a batch of two rows, and what is needed to compute them otherwise."""
    learner = Learner(student, build_features(settings, student, teacher, name="scout", seed=0))
    learner.recorder = Recorder(student, learner.features.places(0))
    ids_BT = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    valid_BT = torch.ones(2, 12, dtype=torch.bool)
    valid_BT[0, :5] = False
    watch = Recorder(teacher, learner.features.places(1))
    with watch.recording(detached=True) as taught:
        teacher(input_ids=ids_BT)
    loss_of = lambda hidden, head: fused_linear_distillation(hidden, head, ids_BT.flatten())  # noqa: E731
    lesson = Lesson(taught, valid_BT, torch.tensor(19.0))
    plain = learner(ids_BT, loss_of)[0]
    loss, *_, sums_N = learner(ids_BT, loss_of, lesson)
    return learner, ids_BT, valid_BT, loss - plain, sums_N


def test_hidden_states_are_those_transformers_gives_at_the_same_depth():
    student, teacher = scout(0), scout(1, hidden_size=48, num_hidden_layers=8)
    learner, ids_BT, valid_BT, loss, sums_N = one_lesson(
        student, teacher, HiddenFeature(kind="hidden", measure="mse", weight=0.7, layers=[(0, 1), (2, 5)])
    )
    ours, theirs = (m(input_ids=ids_BT, output_hidden_states=True).hidden_states for m in (student, teacher))
    projections = learner.features.parts[0].projections
    expected = sum(
        (hidden_state_distance(projection(ours[mine + 1]), theirs[other + 1], "mse") * valid_BT).sum() / 2
        for projection, (mine, other) in zip(projections, [(0, 1), (2, 5)], strict=True)
    )
    torch.testing.assert_close(sums_N[0], expected)
    torch.testing.assert_close(loss, 0.7 * expected / 19, rtol=1e-4, atol=1e-5)


def test_by_default_every_layer_meets_the_one_at_its_depth():
    student, teacher = scout(0), scout(1, num_hidden_layers=8)
    pairs = lambda one: build_features([one], student, teacher, name="scout", seed=0).parts[0].pairs  # noqa: E731
    assert pairs(HIDDEN) == pairs(ROUTER) == [(0, 1), (1, 3), (2, 5), (3, 7)]
    alternating = use_sparse_experts(build("maverick-nano", overrides=HERD, seed=2))
    with_experts = sorted(layer for kind, layer in places_of(alternating) if kind == "router")
    built = build_features([ROUTER], alternating, teacher, name="maverick", seed=0).parts[0]
    assert [ours for ours, _ in built.pairs] == with_experts and built.pairs[-1][1] == 7


def test_a_student_that_is_its_teacher_has_no_feature_loss_and_no_gradient():
    model = scout(0)
    learner, _, _, loss, sums_N = one_lesson(model, scout(0), HIDDEN, RELATIONS, ROUTER)
    assert sums_N.abs().max() < 1e-3 * 19
    gradients = torch.autograd.grad(loss, list(learner.model.parameters()), allow_unused=True)
    assert max(g.abs().max().item() for g in gradients if g is not None) < 1e-4


def test_any_decoder_can_learn_from_any_other_with_grouped_queries_and_other_expert_counts():
    qwen = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=64,
            moe_intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=8,
            num_experts=6,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            vocab_size=64,
        )
    )
    _, _, _, loss, sums_N = one_lesson(scout(0), qwen, HIDDEN, RelationFeature(kind="relations", heads=4), ROUTER)
    assert loss > 0 and (sums_N > 0).all()
    _, _, _, loss, sums_N = one_lesson(
        small_llama(), qwen, HIDDEN, RelationFeature(kind="relations", heads=4, of=["v"])
    )
    assert loss > 0 and (sums_N > 0).all()


@pytest.mark.parametrize(
    ("settings", "student", "words"),
    [
        (RELATIONS, lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)),
         r"loss\.features\.0: mine \(gpt2\) has no q_proj of its own in layer 0: none of its layers has"),
        (ROUTER, small_llama, r"loss\.features\.0: mine \(llama\) has no router in layer 0: none of its layers has"),
        (HiddenFeature(kind="hidden", layers=[(0, 0), (7, 3)]), small_llama,
         r"loss\.features\.0: mine \(llama\) has no layer in layer 7: its layers are 0 to 1"),
        (RelationFeature(kind="relations", heads=7), small_llama, r"features\.0\.heads = 7: must divide the widths"),
        (RouterFeature(kind="router", experts=[0, 1]), lambda: scout(0),
         r"features\.0\.experts: must name one of the student's 4 experts.* teacher's 4; it has 2 entries up to 1"),
    ],
)  # fmt: skip
def test_a_model_that_lacks_what_is_compared_is_refused_by_name(settings, student, words):
    with pytest.raises(ConfigError, match=words):
        build_features([settings], student(), scout(1), name="mine", seed=0)


def test_projections_keep_angles_and_depend_on_the_seed_alone():
    student, teacher = scout(0), scout(1, hidden_size=48)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = (build_features([HIDDEN], student, teacher, name="scout", seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    weight, same = (built.parts[0].projections[0].weight for built in (first, again))
    assert torch.equal(weight, same)
    torch.testing.assert_close(weight.T @ weight, torch.eye(32), atol=1e-5, rtol=0)


def test_a_co_trained_teacher_is_recorded_for_each_student_and_hooks_go_after_the_step(tmp_path):
    assembly, config = small_assembly(tmp_path, ALL, "batch.micro_rows=2")
    hooks = lambda model: sum(len(module._forward_hooks) for module in model.modules())  # noqa: E731
    members = assembly.herd.members.values()
    before = [hooks(member.learner) for member in members]
    (metrics,) = take_steps(assembly, config, [0])
    assert [hooks(member.learner) for member in members] == before
    features = {key: value for key, value in metrics.items() if "/features/" in key}
    maverick = [f"student/maverick/features/{name}" for name in ("hidden", "relations", "router")]
    scout = [f"student/scout/features/{name}" for name in ("hidden", "relations", "router", "router_2")]
    assert sorted(features) == sorted(maverick + scout) and min(features.values()) > 0


def test_students_come_nearer_to_a_frozen_teacher_in_every_feature(tmp_path):
    heavy = ALL.replace("weight: 0.", "weight: 10")
    assembly, config = small_assembly(tmp_path, heavy, "teacher.mode=frozen", "optim.warmup=0")
    metrics = [assembly.herd.take_step(batches_of(assembly, config, 0), step) for step in range(4)]
    for name in ("hidden", "relations", "router"):
        for student in ("scout", "maverick"):
            curve = [step[f"student/{student}/features/{name}"] for step in metrics]
            assert curve[-1] < curve[0], (student, name, curve)


def test_without_features_nothing_is_hooked_and_nothing_is_reported(tmp_path):
    assembly, config = small_assembly(tmp_path)
    (metrics,) = take_steps(assembly, config, [0])
    assert assembly.herd.recorder is None and assembly.herd.pupils["scout"].member.learner.features is None
    assert not any("features" in key for key in metrics)


def test_what_is_learned_for_features_is_saved_resumed_to_the_bit_and_not_exported(tmp_path):
    tracker = open_tracker(tmp_path, experiment="t", run_name="t", enabled=False)
    whole, config = small_assembly(tmp_path, ALL)
    start = whole.herd.pupils["scout"].member.learner.features.parts[0].projections[0].weight.detach().clone()
    take_steps(whole, config, range(4))
    cut, _ = small_assembly(tmp_path, ALL)
    take_steps(cut, config, range(2))
    loop = Loop(cut, config, tmp_path, tracker)
    loop.position.step = 2
    loop.save()
    resumed, _ = small_assembly(tmp_path, ALL)
    Loop(resumed, config, tmp_path, tracker).load(tmp_path / "checkpoints" / "step_000002")
    take_steps(resumed, config, range(2, 4))
    for name, member in resumed.herd.members.items():
        state = member.learner.state_dict()
        for key, tensor in whole.herd.members[name].learner.state_dict().items():
            assert torch.equal(state[key], tensor), key
    learned = [name for name, _ in resumed.herd.pupils["scout"].member.learner.features.named_parameters()]
    assert "parts.0.projections.0.weight" in learned and "parts.2.maps.0.logits_FE" in learned
    assert not torch.equal(whole.herd.pupils["scout"].member.learner.features.parts[0].projections[0].weight, start)
    resumed.herd.pupils["scout"].member.export(tmp_path / "scout", tokenizer=resumed.tokenizer)
    with safe_open(tmp_path / "scout" / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "features" in key] and "lm_head.weight" in file.keys()  # noqa: SIM118


def test_a_feature_loss_that_is_not_finite_stops_the_run(tmp_path):
    assembly, config = small_assembly(tmp_path, ALL)
    weight = assembly.herd.pupils["scout"].member.learner.features.parts[0].projections[0].weight
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"scout: .*not finite.*features.*projections\.0\.weight holds NaN"):
        take_steps(assembly, config, [0])


def test_the_plan_counts_what_feature_losses_learn(tmp_path):
    assembly, config = small_assembly(tmp_path, ALL)
    plans = plan_run(config, world_size=1)
    without = plan_run(configuration.load("configs/smoke.yaml", [*SMALL, f"run.folder={tmp_path}"]), world_size=1)
    for name, pupil in assembly.herd.pupils.items():
        learnt = sum(p.numel() for p in pupil.member.learner.features.parameters())
        assert learnt > 0 and sum(plans[name].setup.beside) == learnt
        more = {
            kind: getattr(plans[name].state, kind) - getattr(without[name].state, kind)
            for kind in ("weights", "master", "moments")
        }
        assert more == {"weights": 2 * learnt, "master": 4 * learnt, "moments": 8 * learnt}
        assert "beside the model" in plans[name].table()
    assert plans["teacher"].state == without["teacher"].state
