"""Runs through the deepspeed launcher that are stopped, killed, refused or robbed: their last line, code and resume.

pytest tests/launch/test_endings.py            (two ranks on this machine)
"""

import os
import random
import re
import shutil
import signal
import time

import pytest

from distill import session
from herd.run.config import load
from herd.run.errors import DataError
from tests.launch.launcher import (
    SHORT,
    SMOKE,
    TRAIN_ONLY,
    finish,
    kill_group,
    launch,
    rank_processes,
    settings,
    start,
    start_ranks,
    train,
    wait_for_step,
)

pytestmark = pytest.mark.timeout(900)  # a busy machine is not a failure

CURVES = ("teacher/ce", "student/scout/ce", "student/maverick/ce", "student/scout/kd", "student/scout/alpha")


def test_a_stopped_run_exits_75_and_resumes_to_the_bits_of_an_uninterrupted_one(tmp_path):
    process = start(tmp_path, overrides=SHORT)
    wait_for_step(process, tmp_path, 2)
    os.kill(rank_processes(process)[0], signal.SIGTERM)
    stopped = finish(process, tmp_path)
    assert stopped.code == 75, stopped.log
    assert "go on with: RESUME" in stopped.log
    config = load(SMOKE, settings(tmp_path, SHORT, "auto")[5::2])
    words = r"was written by 2 ranks, this run has 1: start it on 2 \(deepspeed --num_accelerators 2, on"
    with pytest.raises(DataError, match=words):
        session.prepare_folder(config, stopped.folder, resume="auto", command="")
    resumed, whole = train(tmp_path, {"run": [], "whole": []}, ranks=2, overrides=SHORT, resume="auto").values()
    assert len(resumed.metrics()) == len(whole.metrics()) == 6
    for key in CURVES:
        assert resumed.curve(key) == whole.curve(key), key
    assert (resumed.folder / "digests.txt").read_text() == (whole.folder / "digests.txt").read_text()


def test_a_killed_run_resumes_from_its_last_complete_checkpoint_to_the_same_weights(tmp_path):
    often = [*SHORT, "run.checkpoint_every=1"]
    (process,) = start_ranks(tmp_path, [str(TRAIN_ONLY)], ranks=1, overrides=often, resume="never")
    wait_for_step(process, tmp_path, 3)
    time.sleep(random.Random(0).uniform(0.0, 0.3))  # into the next step or the writing of its checkpoint
    kill_group(process)
    process.wait()
    resumed, whole = train(tmp_path, {"run": [], "whole": []}, ranks=1, overrides=often, resume="auto").values()
    assert (resumed.folder / "digests.txt").read_text() == (whole.folder / "digests.txt").read_text()
    assert [record["step"] for record in resumed.metrics()] == list(range(1, 7))


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [(["batch.rows=3"], 2, "batch.rows = 3"), (["data.source=/no/such/folder"], 4, "/no/such/folder")],
    ids=["configuration", "data"],
)
def test_an_impossible_run_ends_with_one_line_its_code_and_no_folder_in_the_way_of_the_next_try(
    overrides, code, words, tmp_path
):
    run = launch(tmp_path, ranks=2, overrides=overrides, train_only=False)
    assert run.code == code, run.log
    # Rank 1 speaks where a busy machine keeps rank 0 back for ten seconds.
    errors = [line for line in run.log.splitlines() if line.startswith(("error:", "rank 1: error:"))]
    assert len(errors) == 1 and words in errors[0], run.log
    assert "Traceback" not in run.log and not run.folder.exists()


def test_a_run_whose_folder_is_deleted_ends_with_one_line(tmp_path):
    process = start(tmp_path, overrides=["run.steps=10000", "run.evaluate_every=0"], train_only=False)
    wait_for_step(process, tmp_path, 2)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)  # the run may be writing into it
    run = finish(process, tmp_path)
    assert run.code == 3, run.log
    # Left out: the launcher's lines, progress, torch's warnings (of a compiler for GPUs where there is no GPU, say).
    lines = [line for line in run.log.splitlines() if not re.match(r"\[|step |W\d{4} ", line)]
    assert len(lines) == 1, run.log
    assert lines[0].startswith(f"error: {tmp_path / 'run'} was deleted while the run was writing to it; "), run.log
