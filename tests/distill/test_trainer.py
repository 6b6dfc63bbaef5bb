"""The trainer's own parts, in one process: teacher forwards, held-out losses, faults named, mismatches refused.

pytest tests/distill/test_trainer.py
"""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill import session
from distill.assembly import assemble
from distill.diagnosis import first_fault
from distill.loop import Loop, keep_steps
from distill.objectives.codistillation import Herd
from distill.plan import plan_run, show
from distill.session import prepare_folder, without_resume
from herd.llama4.source import open_model
from herd.run import config as configuration
from herd.run import ranks
from herd.run.errors import ConfigError, DataError, DiskFull, Diverged, EnvironmentFault, NumericalError
from herd.run.tracking import open_tracker

SMALL = ["run.name=t", "teacher.head_start=0", "run.evaluate_every=2", "run.steps=3", "run.checkpoint_every=100"]


def small_config(folder, *overrides):
    return configuration.load("configs/smoke.yaml", [*SMALL, f"run.folder={folder}", *overrides])


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A process group of one."""
    ranks.initialise()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A teacher and two students on one rank."""
    folder = tmp_path_factory.mktemp("parts")
    config = small_config(folder)
    return assemble(config, folder), config, folder


def batches_of(parts, config, step):
    return parts.rows.take(step, rows=config.batch.rows, micro_rows=parts.micro_rows, rank=0, world=1)


def test_one_teacher_forward_a_batch_feeds_every_student(parts):
    assembly, config, _ = parts
    calls = []
    handle = assembly.herd.teacher.learner.register_forward_hook(lambda *_: calls.append("teacher"))
    handles = [
        pupil.member.learner.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, pupil in assembly.herd.pupils.items()
    ]
    metrics = assembly.herd.take_step(batches_of(assembly, config, 0), 0)
    for one in (handle, *handles):
        one.remove()
    assert sorted(calls) == ["maverick", "scout", "teacher"]
    assert metrics["student/scout/kd"] > 0 and metrics["teacher/ce"] > 0


def test_the_loop_logs_every_step_and_measures_held_out_losses(parts):
    assembly, config, folder = parts
    tracker = open_tracker(folder, experiment="t", run_name="t", enabled=False)
    Loop(assembly, config, folder, tracker).run(resume_from=None, resume_command="")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["tokens"] == 3 * config.batch.rows * config.data.sequence_length
    assert "heldout/scout" in lines[1] and "heldout/scout" in lines[2] and "heldout/scout" not in lines[0]
    assert abs(sum(lines[0]["student/scout/alpha_histogram"]) - 1) < 1e-9
    assert len(lines[0]["experts/maverick/load"]) == 2 and len(lines[0]["experts/scout/load"]) == 4


def test_accumulated_micro_batches_take_the_steps_of_whole_batches(tmp_path):
    # Without the balance loss, which is taken per micro-batch: another, equally good, estimate.
    same = ["run.precision=fp32", "loss.balance=0", "loss.weighting={kind: constant, alpha: 0.5}"]
    curves = []
    for micro_rows in (4, 1):
        config = small_config(tmp_path, *same, f"batch.micro_rows={micro_rows}")
        assembly = assemble(config, tmp_path)
        steps = [assembly.herd.take_step(batches_of(assembly, config, step), step) for step in range(4)]
        curves.append([[step[key] for key in ("teacher/ce", "student/scout/ce", "student/scout/kd")] for step in steps])
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_before_any_weight_moves_and_names_the_parameter(parts):
    assembly, config, _ = parts
    herd: Herd = assembly.herd
    weight = herd.pupils["scout"].member.learner.model.model.layers[1].self_attn.o_proj.weight
    kept, other = weight.detach().clone(), herd.pupils["maverick"].member.learner.head.weight
    before = other.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"scout.*layers\.1\.self_attn\.o_proj\.weight holds NaN"):
        herd.take_step(batches_of(assembly, config, 5), 5)
    assert torch.equal(other, before)
    with torch.no_grad():
        weight.copy_(kept)
    for member in herd.members.values():
        member.engine.optimizer.zero_grad()


def test_an_overflow_in_the_forward_is_traced_to_the_first_layer_that_made_it(parts):
    assembly, config, _ = parts
    member = assembly.herd.pupils["scout"].member
    norm = member.learner.model.model.layers[2].input_layernorm
    kept = norm.weight.detach().clone()
    with torch.no_grad():
        norm.weight.fill_(3e38)
    forward = lambda batch: member.engine(batch.input_ids_BT)  # noqa: E731
    fault = first_fault(member.learner.model, forward, batches_of(assembly, config, 6))
    member.tap.take()
    with torch.no_grad():
        norm.weight.copy_(kept)
    assert "layers.2.input_layernorm" in fault


def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(tmp_path):
    assembly = assemble(config := small_config(tmp_path, "optim.lr=1e6", "optim.clip=0", "optim.warmup=0"), tmp_path)
    with pytest.raises(NumericalError, match=r"loss of step \d+ is finite, its gradient is not"):
        for step in range(12):
            assembly.herd.take_step(batches_of(assembly, config, step), step)


def test_a_loss_that_is_not_finite_names_the_checkpoint_to_go_back_to_or_says_there_is_none(tmp_path):
    config = small_config(tmp_path, "run.checkpoint_every=2", "run.steps=6", "teacher.head_start=0")
    parts = assemble(config, tmp_path)
    tracker = open_tracker(tmp_path, experiment="t", run_name="t", enabled=False)
    loop, take_step = Loop(parts, config, tmp_path, tracker), parts.herd.take_step

    def fail_at(step):
        def one(batches, number):
            if number == step:
                raise Diverged("teacher: the loss is not finite")
            return take_step(batches, number)

        return one

    parts.herd.take_step = fail_at(0)
    with pytest.raises(
        NumericalError, match=r"not finite; there is no checkpoint yet: start anew under a new run\.name"
    ):
        loop.run(resume_from=None, resume_command="")
    parts.herd.take_step = fail_at(3)
    with pytest.raises(NumericalError, match=rf"not finite; start from {tmp_path}/checkpoints/step_0+2 \(--resume\)"):
        loop.run(resume_from=None, resume_command="")


def test_a_frozen_teacher_that_holds_nan_is_named_before_anything_learns_from_it(parts, tmp_path):
    assembly, _, _ = parts
    folder = tmp_path / "broken"
    assembly.herd.teacher.export(folder, tokenizer=assembly.tokenizer)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = small_config(tmp_path, "teacher.mode=frozen", f"teacher.source={folder}", "teacher.overrides={}")
    taught = assemble(config, tmp_path)
    before = taught.herd.pupils["scout"].member.learner.head.weight.detach().clone()
    with pytest.raises(NumericalError, match=r"teacher\.source = .*broken.*layers\.1\.self_attn\.q_proj.* holds NaN"):
        taught.herd.take_step(batches_of(taught, config, 0), 0)
    assert torch.equal(taught.herd.pupils["scout"].member.learner.head.weight, before)


def test_a_teacher_with_another_vocabulary_is_refused_with_what_differs(parts, tmp_path):
    assembly, config, _ = parts
    folder = tmp_path / "stranger"
    assembly.herd.pupils["scout"].member.export(folder, tokenizer=assembly.tokenizer)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    first, second = [token for token, index in tokens.items() if index in (300, 301)]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    other = small_config(tmp_path, "teacher.mode=frozen", f"teacher.source={folder}", "teacher.overrides={}")
    mine = tmp_path / "tokenizer"
    assembly.tokenizer.save_pretrained(mine)
    with pytest.raises(DataError, match=r"differs from the run's.*30[01]"):
        assemble(
            other.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"path": str(mine)})}), tmp_path
        )


def test_a_sequence_longer_than_the_model_is_refused_by_the_run_and_by_its_plan(tmp_path):
    config = small_config(tmp_path, "data.sequence_length=9000")
    with pytest.raises(ConfigError, match=r"data\.sequence_length = 9000.* takes at most 8192 positions"):
        assemble(config, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.sequence_length = 9000.* takes at most 8192 positions"):
        plan_run(config, world_size=1)


@pytest.mark.parametrize("name", ["teacher", "maverick"])
def test_experts_that_ranks_cannot_share_are_named_with_their_model(name, tmp_path, monkeypatch):
    key, source = {"teacher": ("teacher", "behemoth-nano"), "maverick": ("students.maverick", "maverick-nano")}[name]
    config = small_config(tmp_path, f"{key}.overrides.num_local_experts=3", "parallel.expert_parallel=2")
    line = rf"does not divide the 3 experts \(num_local_experts\) of {name} \({source}\); use one of 1, 3$"
    with pytest.raises(ConfigError, match=line):
        plan_run(config, world_size=2)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)  # models are opened before another rank is needed
    with pytest.raises(ConfigError, match=line):
        assemble(config, tmp_path)


def test_a_frozen_teacher_is_whole_on_every_rank_and_need_not_share_its_experts(tmp_path, monkeypatch):
    odd = ["teacher.mode=frozen", "teacher.overrides.num_local_experts=3", "parallel.zero=3"]
    spread, alone = (small_config(tmp_path, *odd, f"parallel.expert_parallel={ranks_}") for ranks_ in (2, 1))
    planned = plan_run(spread, world_size=2)["teacher"]
    assert planned.state == plan_run(alone, world_size=2)["teacher"].state
    assert planned.state.total == 2 * planned.counts.total  # bf16, and nothing but weights
    monkeypatch.setattr(ranks, "world_size", lambda: 2)  # models are opened before another rank is needed
    stuck = spread.model_copy(
        update={
            "students": {
                "maverick": spread.students["maverick"].model_copy(update={"overrides": {"num_local_experts": 3}})
            }
        }
    )
    with pytest.raises(ConfigError, match=r"does not divide the 3 experts .* of maverick"):
        assemble(stuck, tmp_path)  # the teacher, opened first, was taken


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.folder: .* is a file, not a folder"):
        prepare_folder(small_config(tmp_path), tmp_path / "file" / "t", resume="never", command="")


def test_a_truncated_model_file_is_a_data_error_that_names_the_folder(parts, tmp_path):
    assembly, _, _ = parts
    folder = tmp_path / "cut"
    assembly.herd.pupils["scout"].member.export(folder, tokenizer=assembly.tokenizer)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(DataError, match="cut"):
        open_model(str(folder))


def test_plans_hold_the_bytes_that_live_engines_hold(parts):
    assembly, config, _ = parts
    planned = plan_run(config, world_size=1)
    for name, member in assembly.herd.members.items():
        optimizer = member.engine.optimizer
        weights = sum(p.numel() * p.element_size() for p in member.learner.parameters())
        master = sum(p.numel() * 4 for group in optimizer.param_groups for p in group["params"])
        moments = sum(
            value.numel() * value.element_size()
            for state in optimizer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.dim() > 0
        )
        state = planned[name].state
        assert state.weights == pytest.approx(weights, rel=0.03), name
        assert state.master == pytest.approx(master, rel=0.03), name
        assert state.moments == pytest.approx(moments, rel=0.03), name


def test_a_model_folder_is_planned_as_the_spec_it_was_built_from(parts, tmp_path):
    assembly, _, _ = parts
    assembly.herd.teacher.export(tmp_path / "teacher", tokenizer=assembly.tokenizer)
    frozen = ["teacher.mode=frozen", "teacher.overrides={}", f"teacher.source={tmp_path / 'teacher'}"]
    from_folder = plan_run(small_config(tmp_path, *frozen), world_size=1)["teacher"]
    from_spec = plan_run(small_config(tmp_path, "teacher.mode=frozen"), world_size=1)["teacher"]
    assert from_folder.counts == from_spec.counts and from_folder.state == from_spec.state
    with pytest.raises(ConfigError, match="'scot-nano': no such spec or folder; specs are scout"):
        plan_run(small_config(tmp_path, "teacher.overrides={}", "teacher.source=scot-nano"), world_size=1)


def test_a_full_disk_names_the_run_and_the_field_that_moves_it(tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(session, "assemble", no_room)
    config = small_config(tmp_path, "tracking.enabled=false")
    mend = r"free some space there, or move the run to another disk \(run\.folder\)"
    with pytest.raises(DiskFull, match=rf"^cannot write {tmp_path}/t: the disk is full \([^ ]+ .B free\); {mend}$"):
        session.run(config, resume="never", command="")


def test_a_model_that_will_not_fit_is_refused_before_a_byte_is_written(parts, tmp_path, monkeypatch):
    assembly, _, _ = parts
    monkeypatch.setattr("herd.run.files.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(DiskFull, match=rf"^the model scout needs [\d.]+ .B, 1\.0 kB free at {tmp_path}; free some"):
        assembly.herd.pupils["scout"].member.export(tmp_path / "scout", tokenizer=assembly.tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", ["", "checkpoints/.step_000002.tmp"])
def test_whatever_goes_wrong_in_a_deleted_run_folder_is_told_as_its_deletion(left, tmp_path, monkeypatch):
    def delete(config, folder):
        shutil.rmtree(folder)
        if left:  # a checkpoint in writing made the folder anew
            (folder / left).mkdir(parents=True)
        raise RuntimeError("something of a library")

    monkeypatch.setattr(session, "assemble", delete)
    with pytest.raises(EnvironmentFault, match=rf"^{tmp_path}/t was deleted while the run was writing to it"):
        session.run(small_config(tmp_path, "tracking.enabled=false"), resume="never", command="")


def test_a_bug_in_a_run_whose_folder_is_there_stays_a_bug(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "assemble", lambda config, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.run(small_config(tmp_path, "tracking.enabled=false"), resume="never", command="")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.source=/no/texts", r"^data\.source = /no/texts: no such file or folder \(nor a folder /no\)$"),
        ("data.source=texts/mine.jsonl", r"^data\.source = texts/mine\.jsonl: no such file or folder"),
        ("data.source=~/none/here", r"^data\.source = ~/none/here: no such file"),
        ("tokenizer.path=./none", r"^tokenizer \./none: no such folder"),
        ("tokenizer.path=herd/data", r"^tokenizer herd/data: none of tokenizer\.json, .* in that folder"),
    ],
)
def test_a_dry_run_refuses_what_is_not_there_as_the_run_does(override, line, tmp_path, capsys):
    config = small_config(tmp_path, override)
    for refused in (lambda: show(config, world_size=1, mfu=0.4), lambda: assemble(config, tmp_path)):
        with pytest.raises(DataError, match=line):
            refused()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("overrides", "error", "line"),
    [
        (["teacher.cache={path: c, codec: best=3}"], ConfigError, r"^teacher\.cache\.codec = best=3: must be one of"),
        (["teacher.mode=cached", "teacher.cache={path: c}"], DataError, r"^teacher\.cache\.path = c: no cache\.json"),
    ],
)
def test_a_dry_run_refuses_a_cache_as_the_run_does(overrides, error, line, tmp_path, capsys, monkeypatch):
    config = small_config(tmp_path, *overrides)
    monkeypatch.chdir(tmp_path)
    for refused in (
        lambda: show(config, world_size=1, mfu=0.4),
        lambda: session.run(config, resume="never", command=""),
    ):
        with pytest.raises(error, match=line):
            refused()
    assert capsys.readouterr().out == "" and not any(tmp_path.iterdir())


def test_weights_cut_short_are_refused_with_the_bytes_that_are_missing(parts, tmp_path):
    assembly, _, _ = parts
    folder = tmp_path / "cut"
    assembly.herd.pupils["scout"].member.export(folder, tokenizer=assembly.tokenizer)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    config = small_config(tmp_path, f"students.scout.source={folder}", "students.scout.overrides={}")
    with pytest.raises(DataError, match=rf"^{file}: {size // 2} bytes, its header describes {size}; copy or export it"):
        assemble(config, tmp_path)


def test_rows_longer_than_the_model_are_refused_by_it_and_not_by_how_little_text_there_is(tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.sequence_length = 999999: teacher .* takes at most \d+ positions"):
        assemble(small_config(tmp_path, "data.sequence_length=999999"), tmp_path)


def test_what_is_refused_is_not_in_mlflow_and_what_runs_has_both_parts_of_its_data(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setattr(ranks, "shut_down", lambda: None)  # the tests that follow need the process group
    monkeypatch.setattr(session.aftermath, "compress_and_report", lambda *arguments: None)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(DataError):
        refused = small_config(tmp_path, f"tracking.uri={uri}", "data.source=/no/texts")
        session.run(refused, resume="never", command="c")
    assert not (tmp_path / "mlflow.db").exists()
    session.run(small_config(tmp_path, f"tracking.uri={uri}", "run.steps=1"), resume="never", command="c")
    client = MlflowClient(uri)
    (run,) = client.search_runs(
        [client.get_experiment_by_name("herd").experiment_id], "attributes.run_name = 't'", max_results=5
    )
    contexts = {found.dataset.name: found.tags[0].value for found in run.inputs.dataset_inputs}
    assert contexts == {"train": "training", "heldout": "heldout"}


def test_a_dry_run_asks_nobody_about_what_may_be_on_the_hub(tmp_path, capsys):
    show(small_config(tmp_path, "data.source=some/texts", "tokenizer.path=some/model"), world_size=1, mfu=0.4)
    assert "data:\n  source: some/texts" in capsys.readouterr().out


def test_lines_of_steps_after_the_checkpoint_are_dropped_and_half_a_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_steps(path, up_to=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_resume_command_has_one_resume():
    assert (
        without_resume("python -m distill --resume never --config a.yaml --resume=x")
        == "python -m distill --config a.yaml"
    )
