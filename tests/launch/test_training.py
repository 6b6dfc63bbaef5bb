"""Real runs through the deepspeed launcher: one loss curve however it is split, and resumes that change nothing.

pytest tests/launch/test_training.py            (two ranks on this machine; half a minute a run)
"""

import json
import os
import random
import shutil
import signal
import time

import pytest

from distill.transferred import transferred_of
from herd.llama4.specs import SPECS
from herd.run.config import load
from tests.launch.launcher import SMOKE, finish, kill_group, launch, rank_processes, start, wait_for_step

pytestmark = pytest.mark.timeout(900)  # a busy machine is not a failure

SHORT = ["run.steps=5", "teacher.head_start=1", "run.evaluate_every=0", "run.checkpoint_every=3", "run.precision=fp32"]
CURVES = ("teacher/ce", "student/scout/ce", "student/maverick/ce", "student/scout/kd", "student/maverick/grad_norm")
WEIGHTED = ["loss.weighting={kind: constant, alpha: 0.5}"]
SMALL = "{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1}"
CARRIED = [f"students.scout.transfer={{overrides: {SMALL}, batch_tokens: 256, tokens: 640}}"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """The curve every split is compared with: one rank, ZeRO 1, no expert parallelism; Scout's settings are carried
    over from a smaller model."""
    run = launch(tmp_path_factory.mktemp("one"), ranks=1, overrides=SHORT + WEIGHTED + CARRIED)
    assert run.code == 0, run.log
    return run


@pytest.mark.parametrize(
    "split",
    [
        ["parallel.zero=1"],
        ["parallel.zero=2", "parallel.expert_parallel=2"],
        ["parallel.zero=3"],
    ],
    ids=["zero1", "zero2-ep2", "zero3"],
)
def test_two_ranks_have_the_loss_curve_of_one(split, one_rank, tmp_path):
    run = launch(tmp_path, ranks=2, overrides=SHORT + WEIGHTED + CARRIED + split)
    assert run.code == 0, run.log
    # Summation orders differ, and Adam's first steps magnify that.
    for key in CURVES:
        assert run.curve(key) == pytest.approx(one_rank.curve(key), rel=1e-4), key
    assert adamw_of(run, "scout") == adamw_of(one_rank, "scout")


def adamw_of(run, name: str) -> set[tuple]:
    """Distinct (rate factor, epsilon, decay, averages) of a model's groups; splitting may make more groups of them."""
    groups = json.loads((run.folder / "groups.json").read_text())[name]
    return {(g["lr_factor"], g["eps"], g["weight_decay"], tuple(g["betas"])) for g in groups}


def test_a_launched_run_trains_with_the_rules_of_its_transfer(one_rank):
    config = load(SMOKE, SHORT + WEIGHTED + CARRIED)
    text = SPECS["scout-nano"].config(**config.students["scout"].overrides, vocab_size=config.tokenizer.vocab_size)
    found = transferred_of(config, "scout", text)
    wanted = set()
    for name, rule in found.rules.items():
        free = name.endswith(("norm.weight", "embed_tokens.weight"))
        decay = 0.0 if free else config.optim.weight_decay * rule.weight_decay
        wanted.add((rule.lr, config.optim.eps * rule.eps, decay, found.betas))
    assert len(wanted) > 4 and adamw_of(one_rank, "scout") == wanted


def test_a_stopped_run_exits_75_and_resumes_to_the_bits_of_an_uninterrupted_one(tmp_path):
    whole = launch(tmp_path / "whole", overrides=SHORT[:-1])
    assert whole.code == 0, whole.log
    process = start(tmp_path / "cut", overrides=SHORT[:-1])
    wait_for_step(process, tmp_path / "cut", 2)
    os.kill(rank_processes(process)[0], signal.SIGTERM)
    stopped = finish(process, tmp_path / "cut")
    assert stopped.code == 75, stopped.log
    assert "go on with: RESUME" in stopped.log
    alone = launch(tmp_path / "cut", ranks=1, overrides=SHORT[:-1], resume="auto")
    assert alone.code == 4, alone.log
    assert "was written by 2 ranks, this run has 1: start it on 2 (deepspeed --num_accelerators 2, on" in alone.log
    resumed = launch(tmp_path / "cut", overrides=SHORT[:-1], resume="auto")
    assert resumed.code == 0, resumed.log
    assert len(resumed.metrics()) == len(whole.metrics()) == 6
    for key in (*CURVES, "student/scout/alpha"):
        assert resumed.curve(key) == whole.curve(key), key
    assert (resumed.folder / "digests.txt").read_text() == (whole.folder / "digests.txt").read_text()


def test_a_killed_run_resumes_from_its_last_complete_checkpoint_to_the_same_weights(tmp_path):
    whole = launch(tmp_path / "whole", ranks=1, overrides=[*SHORT[:-1], "run.checkpoint_every=1"])
    assert whole.code == 0, whole.log
    process = start(tmp_path / "cut", ranks=1, overrides=[*SHORT[:-1], "run.checkpoint_every=1"])
    wait_for_step(process, tmp_path / "cut", 3)
    time.sleep(random.Random(0).uniform(0.0, 0.3))  # into the next step or the writing of its checkpoint
    kill_group(process)
    process.wait()
    resumed = launch(tmp_path / "cut", ranks=1, overrides=[*SHORT[:-1], "run.checkpoint_every=1"], resume="auto")
    assert resumed.code == 0, resumed.log
    assert (resumed.folder / "digests.txt").read_text() == (whole.folder / "digests.txt").read_text()
    assert [record["step"] for record in resumed.metrics()] == list(range(1, 7))


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [(["batch.rows=3"], 2, "batch.rows = 3"), (["data.source=/no/such/folder"], 4, "/no/such/folder")],
    ids=["configuration", "data"],
)
def test_an_impossible_run_ends_with_one_line_and_its_code(overrides, code, words, tmp_path):
    run = launch(tmp_path, ranks=2, overrides=overrides)
    assert run.code == code, run.log
    errors = [line for line in run.log.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and words in errors[0], run.log
    assert "Traceback" not in run.log


def test_a_run_refused_before_its_first_step_leaves_no_folder_in_the_way_of_the_next_try(tmp_path):
    run = launch(tmp_path, ranks=1, overrides=["data.source=/no/such/folder"], train_only=False)
    assert run.code == 4 and not run.folder.exists(), run.log


def test_a_run_whose_folder_is_deleted_ends_with_one_line(tmp_path):
    process = start(tmp_path, overrides=["run.steps=10000", "run.evaluate_every=0"], train_only=False)
    wait_for_step(process, tmp_path, 2)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)  # the run may be writing into it
    run = finish(process, tmp_path)
    assert run.code == 3, run.log
    lines = [line for line in run.log.splitlines() if not line.startswith(("[", "step "))]  # the launcher's; progress
    assert len(lines) == 1, run.log
    assert lines[0].startswith(f"error: {tmp_path / 'run'} was deleted while the run was writing to it; "), run.log
