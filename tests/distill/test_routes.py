"""Teachers routed by data source, through the trainer's own parts, one rank: each row learns from its own teacher."""

import json
import random

import pytest
import torch

from distill.assembly import assemble
from distill.loop import Loop
from distill.losses import fused_linear_distillation
from distill.losses.kernel import STATS
from distill.plan import plan_run
from evals.heldout import rows_from
from herd.llama4.source import open_model
from herd.run import config as configuration
from herd.run import ranks
from herd.run.errors import ConfigError, DataError, NumericalError
from herd.run.tracking import open_tracker
from teachers import cache
from teachers.targets import DenseTargets, RoutedTargets, SparseTargets

SMALL = [
    "run.name=t",
    "run.steps=4",
    "run.precision=fp32",
    "run.evaluate_every=2",
    "run.checkpoint_every=2",
    "data.sequence_length=32",
    "tokenizer.vocab_size=512",
    "batch.rows=6",
    "batch.micro_rows=3",
    "teacher={mode: none}",
    "tracking.enabled=false",
    "students={scout: {source: scout-nano, overrides: {hidden_size: 32, intermediate_size: 32, "
    "intermediate_size_mlp: 64, num_local_experts: 2, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 1, head_dim: 16}}}",
    "loss.weighting={kind: constant, alpha: 0.5}",
    "loss.balance=0",
]
NAMES = ("web", "code", "plain")


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A process group of one."""
    ranks.initialise()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of text for each source."""
    root = tmp_path_factory.mktemp("texts")
    dictionary = random.Random(0)
    words = ["".join(dictionary.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(900)]
    for number, name in enumerate(NAMES):
        (root / name).mkdir()
        own = words[number * 300 :][:300]
        for part in range(20):
            (root / name / f"{part:02d}.txt").write_text(" ".join(random.Random(part).choices(own, k=150)))
    return root


@pytest.fixture(scope="module")
def teachers(texts, tmp_path_factory):
    """Two different small teachers that share the run's tokenizer."""
    folder = tmp_path_factory.mktemp("teachers")
    made = {}
    for seed, name in enumerate(("one", "two")):
        parts = assemble(config_for(folder, texts, f"run.seed={seed}"), folder)
        member = parts.herd.pupils["scout"].member
        with torch.no_grad():
            member.learner.model.lm_head.weight.mul_(20)  # far from uniform, so that the teachers differ
        member.export(folder / name, tokenizer=parts.tokenizer)
        made[name] = folder / name
    return made


def config_for(folder, texts, *overrides):
    sources = ", ".join(f"{name}: {{source: {texts / name}}}" for name in NAMES)
    return configuration.load(
        "configs/smoke.yaml", [*SMALL, f"run.folder={folder}", f"data.sources={{{sources}}}", *overrides]
    )


def routed(folder, texts, routes, *overrides, mode="frozen"):
    """`routes`: source -> (teacher folder, its cache settings or None)."""
    listed = ", ".join(
        f"{name}: {{source: {path}{'' if kept is None else f', cache: {kept}'}}}"
        for name, (path, kept) in routes.items()
    )
    return config_for(folder, texts, f"teacher={{mode: {mode}, routes: {{{listed}}}}}", *overrides)


def single(folder, texts, teacher, *overrides):
    return config_for(folder, texts, f"teacher={{mode: frozen, source: {teacher}}}", *overrides)


def step_batches(config, parts, step):
    return parts.rows.take(step, rows=config.batch.rows, micro_rows=parts.micro_rows, rank=0, world=1)


def per_source(stats_ST, batch):
    """Statistics of the tokens of every source."""
    of_token_T = batch.sources_B.repeat_interleave(batch.labels_BT.shape[1])
    return {name: stats_ST[:, of_token_T == number] for number, name in enumerate(NAMES)}


def measured(parts, batch, alpha=0.5):
    """Statistics per token of the student on a batch."""
    herd, labels_T = parts.herd, batch.labels_BT.flatten()
    teacher = herd.teacher
    targets = None
    if teacher is not None:
        targets = teacher.targets_of(batch) if hasattr(teacher, "targets_of") else teacher.targets(batch.input_ids_BT)
    member = herd.pupils["scout"].member
    loss_of = herd.loss_of(member, labels_T, targets=targets, alpha=alpha)
    _, stats_ST, _, _ = member.engine(batch.input_ids_BT, loss_of=loss_of)
    member.tap.take()
    return stats_ST


def test_each_row_learns_from_the_teacher_of_its_source_and_others_from_labels_alone(tmp_path, texts, teachers):
    routes = {"web": (teachers["one"], None), "code": (teachers["two"], None)}
    config = routed(tmp_path, texts, routes)
    parts = assemble(config, tmp_path)
    alone = {
        "web": assemble(single(tmp_path, texts, teachers["one"]), tmp_path),
        "code": assemble(single(tmp_path, texts, teachers["two"]), tmp_path),
        "plain": assemble(config_for(tmp_path, texts), tmp_path),
    }
    seen = set()
    for step in range(3):
        for batch in step_batches(config, parts, step):
            seen |= set(batch.sources_B.tolist())
            mine = per_source(measured(parts, batch), batch)
            for name, other in alone.items():
                theirs = per_source(measured(other, batch), batch)[name].clone()
                if name == "plain":
                    theirs[STATS.index("absent")] = 1.0
                torch.testing.assert_close(mine[name], theirs, rtol=1e-4, atol=1e-4)
            if mine["web"].numel():
                assert (mine["web"][STATS.index("alpha")] == 0.5).all()
    assert seen == {0, 1, 2}


def test_the_teachers_differ_so_a_swapped_route_would_be_seen(tmp_path, texts, teachers):
    one, two = (assemble(single(tmp_path, texts, teachers[name]), tmp_path) for name in ("one", "two"))
    config = config_for(tmp_path, texts)
    batch = step_batches(config, one, 0)[0]
    kd = [measured(parts, batch)[STATS.index("kd")].mean().item() for parts in (one, two)]
    assert abs(kd[0] - kd[1]) > 1e-2


def test_a_step_of_unrouted_rows_moves_weights_as_the_control_does(tmp_path, texts, teachers):
    """All routes on one source, and a step made of the others: the control's step, to the bit."""
    config = routed(tmp_path, texts, {"web": (teachers["one"], None)})
    weights = []
    for chosen in (config, config_for(tmp_path, texts)):
        parts = assemble(chosen, tmp_path)
        batches = [b.of_source(2) for step in range(4) for b in step_batches(chosen, parts, step)]
        batches = [b for b in batches if len(b.keys_B)][:2]
        metrics = parts.herd.take_step(batches, 0)
        weights.append([p.detach().clone() for p in parts.herd.pupils["scout"].member.learner.parameters()])
        assert metrics.get("student/scout/alpha", 0.0) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("kind, clock", [("maturity", {}), ("schedule", {"step": 1})])
def test_a_step_without_a_target_teaches_a_weight_nothing_but_the_time(tmp_path, texts, teachers, kind, clock):
    config = routed(tmp_path, texts, {"web": (teachers["one"], None)}, f"loss.weighting={{kind: {kind}}}")
    parts = assemble(config, tmp_path)
    batches = [b.of_source(2) for step in range(4) for b in step_batches(config, parts, step)]
    weight = parts.herd.pupils["scout"].weighting
    before = weight.state_dict()
    parts.herd.take_step([b for b in batches if len(b.keys_B)][:2], 0)
    assert weight.state_dict() == before | clock
    parts.herd.take_step(step_batches(config, parts, 1), 1)
    assert weight.state_dict() != before | clock


def finished(config, folder, *, resume_from=None):
    """A run to its end; the student's weights and the metrics file's lines."""
    parts = assemble(config, folder)
    Loop(parts, config, folder, open_tracker(folder, experiment="t", run_name="t", enabled=False)).run(
        resume_from=resume_from, resume_command=""
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [p.detach().clone() for p in parts.herd.pupils["scout"].member.learner.parameters()], lines


def test_a_run_resumed_in_the_middle_ends_on_the_same_bits(tmp_path, texts, teachers):
    routes = {"web": (teachers["one"], None), "plain": (teachers["two"], None)}
    config = routed(tmp_path, texts, routes)
    weights, lines = finished(config, tmp_path)
    again, _ = finished(config, tmp_path, resume_from=tmp_path / "checkpoints" / "step_000002")
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    losses = lines[1]
    parts_of_it = [losses[f"heldout/scout/{name}"] for name in NAMES]
    assert min(parts_of_it) <= losses["heldout/scout"] <= max(parts_of_it)
    assert {"heldout/teacher/web", "heldout/teacher/plain"} <= losses.keys()
    assert "heldout/teacher/code" not in losses and "heldout/teacher" not in losses


def test_two_caches_that_two_routes_wrote_teach_in_their_teachers_place(tmp_path, texts, teachers):
    kept = {name: f"{{path: {tmp_path / f'cache-{name}'}, codec: head_and_tail=60}}" for name in ("web", "code")}
    routes = {"web": (teachers["one"], kept["web"]), "code": (teachers["two"], kept["code"])}
    live = routed(tmp_path, texts, routes)
    parts = assemble(live, tmp_path)
    batches = [batch for step in range(2) for batch in step_batches(live, parts, step)]
    theirs = [per_source(measured(parts, batch), batch) for batch in batches]
    parts.herd.close()

    paths = {name: f"{{path: {tmp_path / f'cache-{name}'}}}" for name in routes}
    read = routed(tmp_path, texts, {name: (path, paths[name]) for name, (path, _) in routes.items()}, mode="cached")
    parts = assemble(read, tmp_path)
    assert isinstance(parts.herd.teacher.targets_of(batches[0]), SparseTargets)
    for batch, live_stats in zip(batches, theirs, strict=True):
        for name, stats_ST in per_source(measured(parts, batch), batch).items():
            for stat in ("ce", "alpha", "absent"):
                torch.testing.assert_close(stats_ST[STATS.index(stat)], live_stats[name][STATS.index(stat)])
            for stat in ("teacher_ce", "teacher_entropy"):  # kept in steps of 1/64 and 1/32 nat
                mine, theirs_T = stats_ST[STATS.index(stat)], live_stats[name][STATS.index(stat)]
                torch.testing.assert_close(mine, theirs_T, rtol=0, atol=0.04)
    parts.herd.take_step(step_batches(read, parts, 0), 0)
    parts.herd.close()
    for name, number in (("web", 0), ("code", 1)):
        keys = {key for b in batches for key in b.of_source(number).keys_B.tolist()}
        assert set(cache.open(tmp_path / f"cache-{name}", expecting=None).keys_N.tolist()) == keys

    swapped = {"web": (teachers["two"], paths["code"]), "code": (teachers["one"], paths["web"])}
    with pytest.raises(DataError, match=r"^teacher\.routes\.web: cache .*: data is .* in the cache"):
        assemble(routed(tmp_path, texts, swapped, mode="cached"), tmp_path)


def test_one_teachers_cache_over_several_sources_has_the_data_of_each(tmp_path, texts, teachers):
    settings = f"teacher={{mode: frozen, source: {teachers['one']}, cache: {{path: {tmp_path / 'all'}}}}}"
    config = config_for(tmp_path, texts, settings)
    parts = assemble(config, tmp_path)
    parts.herd.take_step(step_batches(config, parts, 0), 0)
    parts.herd.close()
    manifest = cache.open(tmp_path / "all", expecting=None).manifest
    assert manifest.data == [own.fingerprint for own in parts.corpus.corpora.values()]
    assert manifest.completing_command(tmp_path / "all").count("--data") == 3
    read = config_for(tmp_path, texts, settings.replace("frozen", "cached"))
    parts = assemble(read, tmp_path)
    assert parts.herd.take_step(step_batches(read, parts, 0), 0)["student/scout/alpha"] == 0.5
    parts.herd.close()
    more = [f"data.sources.more={{source: {texts}}}", f"tokenizer.path={teachers['one']}"]
    with pytest.raises(DataError, match=r"cache .*: data is .* in the cache"):
        assemble(config_for(tmp_path, texts, settings.replace("frozen", "cached"), *more), tmp_path)


def test_a_routed_teacher_that_answers_nan_is_named(tmp_path, texts, teachers):
    config = routed(tmp_path, texts, {"web": (teachers["one"], None), "code": (teachers["two"], None)})
    parts = assemble(config, tmp_path)
    with torch.no_grad():
        parts.herd.teacher.routes[1].teacher.model.lm_head.weight[0, 0] = float("nan")
    batches = [batch for step in range(2) for batch in step_batches(config, parts, step)]
    with pytest.raises(NumericalError, match=r"^teacher\.routes\.code\.source = .*two: its logits are not finite"):
        parts.herd.take_step(batches, 0)


def test_evaluation_reads_the_rows_that_training_held_out(tmp_path, texts, teachers):
    config = config_for(tmp_path, texts)
    rows = rows_from(config.data, teachers["one"], rows=8)
    heldout = torch.cat([batch.input_ids_BT for batch in assemble(config, tmp_path).heldout])
    assert torch.equal(rows.input_ids_NT, heldout) and rows.source == config.data.origin
    assert len(set(rows.documents_N.tolist())) >= len(NAMES)


def test_caches_that_mean_different_things_are_refused_together(tmp_path, texts, teachers):
    routes = {"web": (teachers["one"], "head_and_tail=20"), "code": (teachers["two"], "top_k=20")}
    writing = {n: (p, f"{{path: {tmp_path / n}, codec: {codec}}}") for n, (p, codec) in routes.items()}
    assemble(routed(tmp_path, texts, writing), tmp_path).herd.close()
    reading = {n: (p, f"{{path: {tmp_path / n}}}") for n, (p, _) in routes.items()}
    with pytest.raises(ConfigError, match=r"caches disagree .*\(web sampled, code bucket\)"):
        assemble(routed(tmp_path, texts, reading, mode="cached"), tmp_path)


def test_routed_targets_are_each_parts_own_logits_in_any_slice():
    torch.manual_seed(0)
    one, two = torch.randn(8, 7), torch.randn(4, 5)
    part_B = (1, None, 0, 0)
    present_T = torch.tensor([part is not None for part in part_B]).repeat_interleave(4)
    targets = RoutedTargets((DenseTargets(one), DenseTargets(two)), part_B, present_T)
    whole = torch.zeros(16, 7)
    whole[:4, :5], whole[:4, 5:], whole[8:] = two, -1e30, one
    for start in range(16):
        for stop in range(start + 1, 17):
            found = targets.logits(slice(start, stop))
            if not present_T[start:stop].any():
                assert found is None
            else:
                assert torch.equal(found, whole[start:stop, : found.shape[1]])


def test_the_gradient_of_routed_targets_is_the_sum_of_each_parts_own():
    torch.manual_seed(1)
    hidden, head, labels = torch.randn(12, 6).double(), torch.randn(9, 6).double(), torch.randint(0, 9, (12,))
    logits = torch.randn(12, 9).double()
    present_T = torch.tensor([True] * 4 + [False] * 4 + [True] * 4)
    targets = RoutedTargets((DenseTargets(logits[8:]), DenseTargets(logits[:4])), (1, None, 0), present_T)
    x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    fused_linear_distillation(x, w, labels, targets, alpha=0.3, chunk_tokens=5).loss.backward()
    y, v = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    log_q = (y @ v.T).log_softmax(1)
    ce = -log_q.gather(1, labels[:, None]).squeeze(1)
    kl = (logits.softmax(1) * (logits.log_softmax(1) - log_q)).sum(1)
    torch.where(present_T, 0.7 * ce + 0.3 * kl, ce).mean().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(w.grad, v.grad)


def test_a_teacher_with_another_tokenizer_is_refused_by_its_route(tmp_path, texts, teachers):
    folder = tmp_path / "other"
    open_model(str(teachers["two"])).save_pretrained(folder)
    words = json.loads((teachers["two"] / "tokenizer.json").read_text())
    tokens = words["model"]["vocab"]
    first, second = [token for token, index in tokens.items() if index in (300, 301)]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    (folder / "tokenizer.json").write_text(json.dumps(words))
    (folder / "tokenizer_config.json").write_bytes((teachers["two"] / "tokenizer_config.json").read_bytes())
    config = routed(tmp_path, texts, {"web": (teachers["one"], None), "code": (folder, None)})
    with pytest.raises(DataError, match=r"^teacher\.routes\.code: the tokenizer of .* differs from the run's"):
        assemble(config, tmp_path)


def test_every_routed_teacher_is_in_the_plan(tmp_path, texts):
    config = config_for(tmp_path, texts, "teacher={mode: frozen, routes: {web: {source: behemoth-nano}}}")
    assert list(plan_run(config, world_size=1)) == ["teacher.routes.web", "scout"]


def routes_to(mode, routes, more=""):
    return f"teacher={{mode: {mode}, routes: {{{routes}}}{more}}}"


ONE = "web: {source: x}"
SAME_CACHE = "web: {source: x, cache: {path: c}}, code: {source: x, cache: {path: c}}"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ([routes_to("frozen", "wep: {source: x}")], r"teacher\.routes\.wep: .*; did you mean web\?"),
        ([routes_to("frozen", "qqq: {source: x}")], r"teacher\.routes\.qqq: .*; there are web, code, plain"),
        ([routes_to("codistill", ONE)], r"teacher\.routes: .* = codistill.* frozen or cached"),
        ([routes_to("none", ONE)], r"teacher\.routes: there is no teacher to route"),
        ([routes_to("frozen", ONE, ", source: y")], r"teacher\.source: teacher\.routes takes its place"),
        ([routes_to("cached", ONE)], r"teacher\.routes\.web: .*routes\.web\.cache\.path"),
        ([routes_to("frozen", SAME_CACHE)], r"several routes write the cache c"),
        ([routes_to("frozen", ONE), "data.sources={}"], r"teacher\.routes: routes go by the names of data\.sources"),
        (
            [routes_to("frozen", ONE), "objective={kind: on_policy, prompt_tokens: 8}"],
            r"objective\.kind = on_policy: .*teacher\.routes",
        ),
        (["data.source=stdlib"], r"data\.source: data\.sources takes its place; remove one of them"),
        (["data.streaming=true"], r"data\.streaming: data\.sources takes its place"),
        (["data.sources.web.weight=0"], r"data\.sources\.web\.weight = 0: must be more than 0"),
        (["data.heldout_rows=2"], r"data\.heldout_rows = 2: less than one row of each of 3"),
    ],
)
def test_what_cannot_be_routed_is_one_line(settings, line, tmp_path, texts):
    with pytest.raises(ConfigError, match=line) as refused:
        config_for(tmp_path, texts, *settings)
    assert "\n" not in str(refused.value)


def test_a_written_configuration_reads_back_equal(tmp_path, texts):
    config = routed(tmp_path, texts, {"web": ("x", None)})
    (tmp_path / "config.yaml").write_text(configuration.dump(config))
    assert configuration.load(tmp_path / "config.yaml") == config
