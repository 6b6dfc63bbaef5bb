"""One loss curve however a run is split over ranks, with the settings that its transfer carried over.

pytest tests/launch/test_training.py            (one rank, then three runs of two ranks, on this machine)
"""

import json

import pytest

from distill.transferred import transferred_of
from herd.llama4.specs import SPECS
from herd.run.config import load
from tests.launch.launcher import SHORT, SMOKE, train

pytestmark = pytest.mark.timeout(900)  # a busy machine is not a failure

CURVES = ("teacher/ce", "student/scout/ce", "student/maverick/ce", "student/scout/kd", "student/maverick/grad_norm")
WEIGHTED = ["loss.weighting={kind: constant, alpha: 0.5}"]
SMALL = "{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1}"
CARRIED = [f"students.scout.transfer={{overrides: {SMALL}, batch_tokens: 256, tokens: 640}}"]
SETTINGS = [*SHORT, "run.precision=fp32", *WEIGHTED, *CARRIED]
SPLITS = {
    "zero1": ["parallel.zero=1"],
    "zero2-ep2": ["parallel.zero=2", "parallel.expert_parallel=2"],
    "zero3": ["parallel.zero=3"],
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """The curve every split is compared with: one rank, ZeRO 1, no expert parallelism; Scout's settings are carried
    over from a smaller model."""
    return train(tmp_path_factory.mktemp("one"), {"run": []}, ranks=1, overrides=SETTINGS)["run"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Every split, trained by the same two ranks one after another."""
    return train(tmp_path_factory.mktemp("two"), SPLITS, ranks=2, overrides=SETTINGS)


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_have_the_loss_curve_of_one(split, one_rank, two_ranks):
    # Summation orders differ, and Adam's first steps magnify that.
    for key in CURVES:
        assert two_ranks[split].curve(key) == pytest.approx(one_rank.curve(key), rel=1e-4), key
    assert adamw_of(two_ranks[split], "scout") == adamw_of(one_rank, "scout")


def adamw_of(run, name: str) -> set[tuple]:
    """Distinct (rate factor, epsilon, decay, averages) of a model's groups; splitting may make more groups of them."""
    groups = json.loads((run.folder / "groups.json").read_text())[name]
    return {(g["lr_factor"], g["eps"], g["weight_decay"], tuple(g["betas"])) for g in groups}


def test_a_launched_run_trains_with_the_rules_of_its_transfer(one_rank):
    config = load(SMOKE, SETTINGS)
    text = SPECS["scout-nano"].config(**config.students["scout"].overrides, vocab_size=config.tokenizer.vocab_size)
    found = transferred_of(config, "scout", text)
    wanted = set()
    for name, rule in found.rules.items():
        free = name.endswith(("norm.weight", "embed_tokens.weight"))
        decay = 0.0 if free else config.optim.weight_decay * rule.weight_decay
        wanted.add((rule.lr, config.optim.eps * rule.eps, decay, found.betas))
    assert len(wanted) > 4 and adamw_of(one_rank, "scout") == wanted
