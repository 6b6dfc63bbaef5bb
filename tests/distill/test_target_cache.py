"""Soft targets written while a teacher runs, and read in its place: through the trainer's own parts, one rank."""

import json
import shlex
import shutil

import pytest
import torch
from huggingface_hub import constants

from distill import run_record
from distill.assembly import assemble
from distill.loop import Loop
from distill.session import no_trace_of_a_refusal, prepare_folder
from herd.llama4.source import open_model
from herd.run import checkpoints, ranks
from herd.run import config as configuration
from herd.run.errors import ConfigError, DataError
from herd.run.tracking import open_tracker
from teachers import cache
from teachers.__main__ import main
from teachers.cache.writer import Writer
from teachers.commands.inspection import inspect

SMALL = [
    "run.name=t",
    "run.steps=2",
    "run.precision=fp32",
    "teacher.head_start=0",
    "students={scout: {source: scout-nano, overrides: {hidden_size: 64, intermediate_size: 64, "
    "intermediate_size_mlp: 128, num_local_experts: 4}}}",
    "loss.weighting={kind: constant, alpha: 0.5}",
]


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A process group of one."""
    ranks.initialise()


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A small teacher as a run would have exported it, whose every model has the run's tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    parts = assemble(config_for(folder), folder)
    parts.herd.teacher.export(folder / "teacher", tokenizer=parts.tokenizer)
    return folder / "teacher"


def config_for(folder, *overrides):
    return configuration.load("configs/smoke.yaml", [*SMALL, f"run.folder={folder}", *overrides])


def frozen(folder, teacher_folder, *overrides):
    return config_for(
        folder, "teacher.mode=frozen", "teacher.overrides={}", f"teacher.source={teacher_folder}", *overrides
    )


def take_steps(config, folder, steps=(0, 1)):
    """Metrics of these steps; what was written is sealed."""
    run_record.begin(folder, "distill")
    parts = assemble(config, folder)
    taken = []
    for step in steps:
        batches = parts.rows.take(step, rows=config.batch.rows, micro_rows=parts.micro_rows, rank=0, world=1)
        taken.append(parts.herd.take_step(batches, step))
    parts.herd.close()
    return taken


def test_a_checkpoint_makes_the_targets_written_before_it_last(tmp_path, teacher_folder, monkeypatch):
    path = tmp_path / "cache"
    config = frozen(
        tmp_path, teacher_folder, f"teacher.cache={{path: {path}}}", "run.steps=2", "run.checkpoint_every=1"
    )
    events = []
    for owner, name in ((Writer, "flush"), (checkpoints, "begin")):
        whole = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, name=name, whole=whole, **k: (events.append(name), whole(*a, **k))[1]
        )
    tracker = open_tracker(tmp_path, experiment="t", run_name="t", enabled=False)
    Loop(assemble(config, tmp_path), config, tmp_path, tracker).run(resume_from=None, resume_command="")
    assert events == ["flush", "begin"] * 2


def written(tmp_path, teacher_folder, codec="head_and_tail=60"):
    """A cache that a run with a frozen teacher wrote through, and that run's metrics."""
    path = tmp_path / "cache"
    config = frozen(tmp_path, teacher_folder, f"teacher.cache={{path: {path}, codec: {codec}}}")
    return path, take_steps(config, tmp_path)


def test_a_student_learns_from_the_cache_what_it_learns_from_the_teacher_that_wrote_it(tmp_path, teacher_folder):
    # Enough of the 1024 classes that what the tail is drawn for is small beside the tolerance, whatever the text.
    path, live = written(tmp_path, teacher_folder, codec="head_and_tail=240")
    cached = config_for(
        tmp_path,
        "teacher.mode=cached",
        f"teacher.source={teacher_folder}",
        "teacher.overrides={}",
        f"teacher.cache.path={path}",
    )
    read = take_steps(cached, tmp_path)
    for mine, theirs in zip(read, live, strict=True):
        for key in ("student/scout/ce", "student/scout/kd", "student/scout/teacher_entropy"):
            assert mine[key] == pytest.approx(theirs[key], rel=0.02), key
    assert read[0]["student/scout/ce"] == pytest.approx(live[0]["student/scout/ce"], rel=1e-6)


def test_rows_without_a_target_are_refused_learnt_hard_or_completed_as_asked(tmp_path, teacher_folder):
    path, _ = written(tmp_path, teacher_folder)
    rows = len(cache.open(path, expecting=None))

    def read(missing, step):
        source = [f"teacher.source={teacher_folder}", "teacher.overrides={}"]
        settings = f"teacher.cache={{path: {path}, missing: {missing}}}"
        return take_steps(config_for(tmp_path, "teacher.mode=cached", *source, settings), tmp_path, steps=(step,))[0]

    with pytest.raises(DataError, match=r"4 of the 4 rows asked for have no target.*python -m teachers cache"):
        read("refuse", 5)
    hard = read("hard", 5)
    assert hard["student/scout/alpha"] == 0 and len(cache.open(path, expecting=None)) == rows
    completed = read("forward", 5)
    assert completed["student/scout/alpha"] == pytest.approx(0.5)
    assert len(cache.open(path, expecting=None)) == rows + 4
    again = read("refuse", 5)
    assert again["student/scout/kd"] == pytest.approx(completed["student/scout/kd"], rel=1e-6)


def test_a_teacher_that_trains_renews_its_rows_and_says_at_which_step(tmp_path):
    path = tmp_path / "cache"
    config = config_for(tmp_path, f"teacher.cache.path={path}", "teacher.head_start=1")
    take_steps(config, tmp_path, steps=(0, 1, 2))
    reader = cache.open(path, expecting=None)
    assert sorted(set(reader.steps_N.tolist())) == [2, 3] and len(reader) == 8
    assert inspect(path, rows=1)["teacher_steps"] == [2, 3]
    take_steps(config, tmp_path, steps=(2,))
    assert len(cache.open(path, expecting=None)) == 8


def test_a_run_finds_its_cache_again_under_another_experiment_and_one_begun_anew_does_not(tmp_path):
    settings = ["teacher.cache.path=" + str(tmp_path / "cache"), "run.name=one"]
    first, again = (tmp_path / name for name in ("first", "again"))
    for folder in (first, again):
        folder.mkdir()
    take_steps(config_for(tmp_path, *settings), first, steps=(0,))
    take_steps(config_for(tmp_path, *settings, "tracking.experiment=another"), first, steps=(1,))
    assert len(cache.open(tmp_path / "cache", expecting=None)) == 8
    with pytest.raises(DataError, match=r"teacher is first-\w{16} in the cache, again-\w{16} in this run; .*folder"):
        take_steps(config_for(tmp_path, *settings), again, steps=(0,))


def test_a_refused_start_takes_its_own_cache_along_and_no_one_elses(tmp_path):
    settings = [f"teacher.cache.path={tmp_path / 'cache'}", "run.name=one"]
    config = config_for(tmp_path, *settings)
    for owner, left in (("one", False), ("two", True)):
        with pytest.raises(ConfigError, match="mend it"), no_trace_of_a_refusal(config, tmp_path / "one"):
            for name in {"one", owner}:
                prepare_folder(
                    config_for(tmp_path, *settings, f"run.name={name}"),
                    tmp_path / name,
                    resume="never",
                    command="distill",
                )
            assemble(config, tmp_path / owner).herd.close()
            raise ConfigError("mend it")
        assert not (tmp_path / "one").exists()
        assert (tmp_path / "cache" / "cache.json").exists() == left


@pytest.mark.parametrize("data", ["data=BODY", "data.sources={own: BODY, other: TEXT}"])
def test_the_printed_command_makes_the_missing_rows_also_of_a_teacher_on_the_hub(
    data, tmp_path, teacher_folder, monkeypatch, capsys
):
    snapshot = tmp_path / "hub" / "models--org--teacher" / "snapshots" / "abc"
    shutil.copytree(teacher_folder, snapshot)
    refs = tmp_path / "hub" / "models--org--teacher" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for field in ("body", "text"):
        texts = tmp_path / f"some {field}"
        texts.mkdir()
        for name in "abcdefgh":
            line = json.dumps({field: f"The llama {name} ate the {field} and slept. " * 60})
            (texts / f"{name}.jsonl").write_text(f"{line}\n" * 4)
        data = data.replace(field.upper(), f"{{source: {texts}, text_field: {field}}}")
    settings = [
        "teacher.overrides={}",
        "teacher.source=org/teacher",
        f"teacher.cache.path={tmp_path / 'a cache'}",
        data,
        "data.sequence_length=128",
        "data.heldout_rows=4",
    ]
    take_steps(config_for(tmp_path, "teacher.mode=frozen", *settings), tmp_path, steps=(0,))
    reader = cache.open(tmp_path / "a cache", expecting=None)
    for command in reader.manifest.completing_command(reader.folder).split(" && "):
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "teachers"]
        assert main([*words[3:], "--no-tracking"]) == 0, capsys.readouterr().err
    read = config_for(tmp_path, "teacher.mode=cached", "tokenizer.path=org/teacher", *settings)
    assert take_steps(read, tmp_path, steps=(1,))[0]["student/scout/alpha"] == 0.5


def test_a_cache_of_something_else_is_refused_with_the_field(tmp_path, teacher_folder):
    path, _ = written(tmp_path, teacher_folder)
    other = tmp_path / "other"
    model = open_model(str(teacher_folder))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    model.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((teacher_folder / name).read_bytes())
    base = ["teacher.mode=cached", "teacher.overrides={}", f"teacher.cache.path={path}"]
    for changed, word in (
        (["data.sequence_length=64", f"teacher.source={teacher_folder}"], "sequence_length is 128 in the cache, 64"),
        (["loss.temperature=2", f"teacher.source={teacher_folder}"], "temperature is 1.0 in the cache, 2.0"),
        ([f"teacher.source={other}"], "teacher is .* in the cache"),
    ):
        with pytest.raises(DataError, match=word):
            assemble(config_for(tmp_path, *base, *changed), tmp_path)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (["teacher.mode=cached"], "needs teacher.cache.path"),
        (["teacher.mode=none", "teacher.cache.path=x"], "there are no targets to write"),
        (["teacher.cache={path: x, missing: hard}"], "only teacher.mode = cached reads"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, word, tmp_path):
    with pytest.raises(ConfigError, match=word):
        config_for(tmp_path, *settings)
