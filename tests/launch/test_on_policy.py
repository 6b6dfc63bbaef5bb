"""On-policy runs on real ranks: students write the same rows however the run is split.

pytest tests/launch/test_on_policy.py            (one rank, then two runs of two)
"""

import pytest

from tests.launch.launcher import train

pytestmark = pytest.mark.timeout(900)  # a busy machine is not a failure

SETTINGS = [
    *("run.steps=2", "teacher.head_start=1", "run.evaluate_every=0", "run.checkpoint_every=100", "run.precision=fp32"),
    "objective={kind: on_policy, fraction: 0.5, prompt_tokens: 64}",
    "loss.weighting={kind: constant, alpha: 0.5}",
]
SPLITS = {"zero2-ep2": ["parallel.zero=2", "parallel.expert_parallel=2"], "zero3": ["parallel.zero=3"]}
CURVES = (
    "teacher/ce",
    "student/scout/on_policy/kd",
    "student/scout/on_policy/reverse_kl",
    "student/maverick/on_policy/teacher_logprob",
    "student/maverick/ce",
    "student/maverick/grad_norm",
)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Two micro-batches of two rows on one rank."""
    runs = {"run": ["batch.micro_rows=2"]}
    return train(tmp_path_factory.mktemp("one"), runs, ranks=1, overrides=SETTINGS)["run"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Two micro-batches of one row on each rank: the same rows in each micro-batch."""
    return train(tmp_path_factory.mktemp("two"), SPLITS, ranks=2, overrides=[*SETTINGS, "batch.micro_rows=1"])


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_write_and_learn_what_one_does(split, one_rank, two_ranks):
    for key in CURVES:
        assert two_ranks[split].curve(key) == pytest.approx(one_rank.curve(key), rel=1e-4, abs=1e-5), key
