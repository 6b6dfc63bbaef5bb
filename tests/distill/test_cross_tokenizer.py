"""A student of a frozen teacher that has a tokenizer of its own, in the trainer; tokenizers and models are made here.

pytest tests/distill/test_cross_tokenizer.py
"""

import pytest
import torch

from distill.aftermath import evaluate_all
from distill.assembly import assemble, open_run_tokenizer
from distill.loop import Loop
from distill.losses.kernel import STATS
from evals import Probe
from herd.data.corpora import open_corpus
from herd.run import config as configuration
from herd.run import ranks
from herd.run.errors import ConfigError, DataError
from herd.run.tracking import open_tracker
from teachers.translated import TranslatedTeacher

SMALL = ["teacher.head_start=0", "run.evaluate_every=0", "run.checkpoint_every=100", "data.heldout_rows=4"]
SIZES = "{hidden_size: 64, intermediate_size: 64, intermediate_size_mlp: 128, num_local_experts: 4}"
SPANS = "loss.cross_tokenizer={kind: spans}"


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A process group of one."""
    ranks.initialise()


def small_config(folder, *overrides):
    return configuration.load("configs/smoke.yaml", [*SMALL, f"run.folder={folder}", *overrides])


def take_steps(assembly, config, count):
    rows = {"rows": config.batch.rows, "micro_rows": assembly.micro_rows, "rank": 0, "world": 1}
    return [assembly.herd.take_step(assembly.rows.take(step, **rows), step) for step in range(count)]


def soft_loss(assembly):
    """Of the first rows, without labels."""
    batch = assembly.rows.take(0, rows=4, micro_rows=4, rank=0, world=1)[0]
    member, targets = assembly.herd.pupils["scout"].member, assembly.herd.teacher.targets(batch.input_ids_BT)
    with torch.no_grad():
        loss_of = assembly.herd.loss_of(member, batch.labels_BT.flatten(), targets=targets, alpha=1.0)
        return member.engine(batch.input_ids_BT, loss_of=loss_of)[0].item()


@pytest.fixture(scope="module")
def elder(tmp_path_factory):
    """The folder of a teacher with 1024 tokens of its own, trained for some steps."""
    folder = tmp_path_factory.mktemp("elder")
    alone = ["run.name=elder", "run.steps=30", "teacher.mode=none", "optim.lr=8e-3"]
    config = small_config(folder, *alone, f"students={{elder: {{source: scout-nano, overrides: {SIZES}}}}}")
    assembly = assemble(config, folder)
    take_steps(assembly, config, 30)
    assembly.herd.pupils["elder"].member.export(folder / "elder", tokenizer=assembly.tokenizer)
    return folder / "elder"


def taught_by(elder, folder, *overrides):
    taught = ["run.name=t", "run.steps=12", "teacher.mode=frozen", f"teacher.source={elder}", "teacher.overrides={}"]
    scout = f"students={{scout: {{source: scout-nano, overrides: {SIZES}}}}}"
    config = small_config(folder, *taught, scout, "tokenizer.vocab_size=600", *overrides)
    return assemble(config, folder), config


def test_a_tokenizer_mismatch_names_the_setting_that_allows_it(elder, tmp_path):
    config = small_config(tmp_path, "run.name=t", "tokenizer.vocab_size=600")
    open_run_tokenizer(config, open_corpus(config.data)).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"differs from the run's.*loss\.cross_tokenizer=\{kind: spans\}"):
        taught_by(elder, tmp_path, f"tokenizer.path={tmp_path / 'tokenizer'}")


def test_a_teacher_built_for_the_run_has_no_tokenizer_of_its_own(tmp_path):
    config = small_config(tmp_path, "run.name=t", "teacher.mode=frozen", "loss.cross_tokenizer={kind: spans}")
    with pytest.raises(
        ConfigError, match=r"teacher\.source = behemoth-nano is built for this run and has no tokenizer"
    ):
        assemble(config, tmp_path)


@pytest.mark.parametrize("kind", ["uld", "spans"])
def test_students_with_another_tokenizer_learn_what_the_teacher_says(kind, elder, tmp_path):
    assembly, config = taught_by(
        elder, tmp_path, f"loss.cross_tokenizer={{kind: {kind}}}", "loss.weighting={kind: constant, alpha: 1.0}"
    )
    assert isinstance(assembly.herd.teacher, TranslatedTeacher) and len(assembly.tokenizer) == 600
    before = soft_loss(assembly)
    curve = take_steps(assembly, config, 12)
    assert soft_loss(assembly) < 0.9 * before
    first, last = (
        {key: step[f"student/scout/{key}"] for key in ("ce", "kd", "alpha")} for step in (curve[0], curve[-1])
    )
    assert first["alpha"] > 0.9, "labels are used only where there is no span"
    if kind == "spans":  # sorted masses alone say how sure to be, not of what
        assert last["kd"] < 0.9 * first["kd"] and last["ce"] < first["ce"] - 0.3


def test_statistics_compare_both_models_on_the_same_bytes(elder, tmp_path):
    assembly, _ = taught_by(elder, tmp_path, SPANS)
    member = assembly.herd.pupils["scout"].member
    batch = assembly.rows.take(0, rows=4, micro_rows=4, rank=0, world=1)[0]
    targets = assembly.herd.teacher.targets(batch.input_ids_BT)
    loss_of = assembly.herd.loss_of(member, batch.labels_BT.flatten(), targets=targets, alpha=0.5)
    _, stats_ST, _, _ = member.engine(batch.input_ids_BT, loss_of=loss_of)
    covered = targets.span_T >= 0
    teacher_ce = stats_ST[STATS.index("teacher_ce")][covered].double().sum().item()
    total, count = assembly.herd.teacher.score(batch.input_ids_BT, batch.labels_BT.flatten())
    assert teacher_ce == pytest.approx(total, rel=1e-3) and count == int(covered.sum())
    assert covered.float().mean() > 0.95


def test_a_run_goes_to_its_evaluation_with_a_held_out_loss_of_the_teacher(elder, tmp_path):
    assembly, config = taught_by(elder, tmp_path, SPANS, "run.evaluate_every=1")
    tracker = open_tracker(tmp_path, experiment="t", run_name="t", enabled=False)
    loop = Loop(assembly, config, tmp_path, tracker)
    loop.position.step = 1
    heldout = loop.evaluate()
    assert 2 < heldout["heldout/teacher"] < heldout["heldout/scout"] < 8
    run_folder = tmp_path / "run"
    assembly.herd.pupils["scout"].member.export(run_folder / "students" / "scout", tokenizer=assembly.tokenizer)
    with Probe() as probe:
        results = evaluate_all(config, run_folder, {}, probe)
    assert [result.name for result in results] == ["elder", "scout"]
    assert results[0].bits_per_byte < results[1].bits_per_byte and results[1].reference is None


def test_resumed_rows_are_translated_to_the_same_bits(elder, tmp_path):
    runs = [taught_by(elder, tmp_path, SPANS) for _ in range(2)]
    states = []
    for assembly, config in runs:
        take_steps(assembly, config, 2)
        states.append(assembly.herd.pupils["scout"].member.learner.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(*(state.values() for state in states), strict=True))
