"""The conformance suite: our losses pass it, each of the known defects fails the right checks of it, and only those."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from distill.conformance import __main__ as command
from distill.conformance import our_cache, ours, ranks, suite
from distill.conformance.definitions import by_definition
from distill.conformance.problem import draw
from distill.conformance.target import load, of
from distill.conformance.verdict import Check, equal, judge
from distill.learner import Learner
from distill.losses import DenseTargets, distillation_from_logits, fused_linear_distillation
from herd.run.errors import DONE, NUMERICAL, USAGE, ConfigError
from tests.distill import defects

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"

FAILED_BY = {
    (1, defects.student_padded_with_zero): {"wider_vocabulary"},
    (2, defects.truncated): {"non_negative", "head_mass", "zero_at_identity", "data_processing", "definition"},
    (3, defects.teacher_renormalised): {"zero_at_identity", "head_mass", "data_processing", "definition"},
    (3, defects.cache_renormalised): {"kept_masses"},
    (3, defects.cache_of_a_cut_off_tail): {"kept_masses"},
    (4, defects.both_renormalised): {"tail_matters", "data_processing", "definition"},
    (5, defects.truncated_reverse): {
        "mass_on_support", "non_negative", "zero_at_identity", "data_processing", "definition",
    },
    (6, defects.temperature_ignored): {"temperature_is_used", "definition"},
    (6, defects.temperature_only_a_factor): {"temperature_is_used", "definition"},
    (7, defects.hidden_cross_entropy): {"zero_at_identity", "labels_do_not_matter", "definition"},
    (8, defects.unshifted_mask): {"ignored_positions", "accumulation", "definition"},
    (9, defects.divided_twice): {"duplicated_batch", "accumulation", "definition"},
    (10, defects.cross_entropy_called_kl): {"zero_at_identity", "definition"},
    (11, defects.mean_over_vocabulary): {"vocabulary_size", "definition"},
    (12, defects.mean_of_its_own): {"accumulation"},
    (12, defects.mean_over_all_positions): {"accumulation"},
    (13, defects.nan_without_labels): {"all_ignored"},
    (14, defects.broadcasts): {"misaligned_targets"},
    (14, defects.cache_by_position): {"misaligned_targets"},
    (15, defects.ids_of_17_bits): {"large_ids"},
    (15, defects.cache_of_16_bits): {"large_ids"},
    (16, defects.clipped_per_entry): {"non_negative", "definition"},
    (17, defects.softcap_ignored): {"more_than_a_matrix"},
    (17, defects.scale_ignored): {"more_than_a_matrix"},
    (17, defects.bias_ignored): {"more_than_a_matrix"},
}  # fmt: skip
"""Besides the check named after a defect: what the defect implies. A renormalised teacher does move mass, a loss that
is divided twice is neither its definition nor a sum of micro-batches."""
RIGHT = (
    defects.right_dense,
    defects.right_sum,
    defects.right_model_labels,
    defects.right_bucket,
    defects.right_fused,
    defects.right_cache,
    defects.clipped_per_token,
)


@pytest.fixture(scope="module")
def report():
    """All our paths, on one and on two ranks."""
    return suite.run([load(f"distill.conformance.ours:{path}") for path in ours.PATHS])


def test_all_our_paths_pass_every_check_that_applies(report):
    assert not report.failed, report.to_text()
    for part in report.parts[:-1]:
        assert "rank_count" in {one.check.name for one in part.verdicts if one.status == "passed"}


def test_no_check_is_skipped_by_all_of_our_paths_but_the_one_of_heads_we_refuse(report):
    assert set(report.names("passed")) == set(suite.NAMES) - {"more_than_a_matrix", "kept_masses"}


@pytest.mark.parametrize("codec", our_cache.CODECS)
def test_our_caches_pass_what_a_cache_is_asked(codec):
    report = suite.run([load(f"distill.conformance.our_cache:{codec}")])
    assert not report.failed, report.to_text()
    assert set(report.names("passed")) == {"misaligned_targets", "large_ids", "kept_masses"}


@pytest.mark.parametrize(("defect", "failed"), FAILED_BY.items(), ids=[loss.__name__ for _, loss in FAILED_BY])
def test_each_defect_fails_the_checks_named_after_it_and_what_it_implies(defect, failed):
    number, loss = defect
    report = suite.run([of(loss, loss.__name__)])
    assert set(report.failed) == failed, report.to_text()
    named = {check.name for check in suite.CHECKS if number in check.defects}
    assert named & failed


@pytest.mark.parametrize("loss", RIGHT, ids=lambda loss: loss.__name__)
def test_a_loss_without_a_defect_passes(loss):
    report = suite.run([of(loss, loss.__name__)])
    assert not report.failed, report.to_text()
    assert report.count("passed") >= 2


def test_all_17_defects_are_covered_by_checks_and_by_re_creations():
    numbers = set(range(1, 18))
    assert {number for number, _ in FAILED_BY} == numbers
    assert {number for check in suite.CHECKS for number in check.defects} == numbers


def test_paths_that_are_not_one_loss_are_found():
    dense, bucket, hidden = (
        of(loss, loss.__name__) for loss in (defects.right_dense, defects.right_bucket, defects.hidden_cross_entropy)
    )
    assert not suite.run([dense, bucket], only=["paths_agree"]).failed
    assert suite.run([dense, hidden], only=["paths_agree"]).failed == ["paths_agree"]


def test_two_real_ranks_find_a_count_that_is_not_used():
    losses = ("right_dense", "right_sum", "mean_of_its_own")
    report = suite.run([load(f"tests.distill.defects:{loss}") for loss in losses], only=[ranks.NAME])
    assert [part.verdicts[0].status for part in report.parts] == ["passed", "passed", "failed"], report.to_text()


HEADS = {
    "plain": (Qwen2Config, Qwen2ForCausalLM, {}),
    "soft cap": (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "logit scale": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.4}),
    "bias": (PhiConfig, PhiForCausalLM, {}),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_student_is_trained_on_its_own_logits_whatever_its_head_is(kind):
    configuration, model_class, more = HEADS[kind]
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = configuration(vocab_size=32, num_key_value_heads=2, pad_token_id=0, **size, **more)
    torch.manual_seed(0)
    model = model_class(config).double()
    if kind == "bias":
        torch.nn.init.normal_(model.lm_head.bias)
    input_ids_BT = torch.randint(0, 32, (2, 5))
    labels_T = torch.randint(0, 32, (10,))
    targets = DenseTargets(torch.randn(10, 32, dtype=torch.float64))
    expected = distillation_from_logits(model(input_ids_BT).logits.flatten(0, 1), labels_T, targets).loss

    learner = Learner(model)
    assert learner.plain_head == (kind == "plain")

    def loss_of(outputs, head):
        if head is None:
            return distillation_from_logits(outputs, labels_T, targets)
        return fused_linear_distillation(outputs, head, labels_T, targets)

    loss = learner(input_ids_BT, loss_of=loss_of)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_samples_read_with_a_student_renormalised_over_them_are_biased():
    target = of(defects.both_renormalised, "renormalised", tail="sampled")
    assert "unbiased" in suite.run([target]).failed
    assert not suite.run([load("distill.conformance.ours:sampled")], only=["unbiased"]).failed


def test_a_loss_of_float32_or_of_rows_is_found_out():
    def rounded(student_logits, teacher_logits, labels):
        return defects.right_dense(student_logits.float(), teacher_logits.float(), labels, alpha=1.0).double()

    def rows_only(student_logits, teacher_logits, mask):
        rows, positions, _ = student_logits.shape
        assert mask.shape == (rows, positions)
        return defects.right_sum(student_logits, teacher_logits, mask) / mask.sum().clamp_min(1)

    for loss, kind, dtype in ((rounded, "TV", torch.float32), (rows_only, "BTV", torch.float64)):
        target = of(loss, loss.__name__)
        assert (target.layout.kind, target.layout.dtype) == (kind, dtype)
        assert not suite.run([target]).failed


def test_what_a_loss_is_called_with_follows_its_signature():
    class Module(torch.nn.Module):
        def forward(self, logits_TV, target_logits_TV, /, labels_T, *, tau=1.0, unknown=3):
            return defects.right_dense(logits_TV, target_logits_TV, labels_T, alpha=1.0, temperature=tau)

    target = of(Module(), "module")
    assert set(target.parameters) == {"student_logits", "teacher_logits", "labels", "temperature"}
    assert not suite.run([target]).failed
    assert suite.run([target], skip=["definition"]).names("skipped").count("definition") == 1


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda student_logits, teacher_logits, gamma: 0, "its argument gamma is not understood"),
        (lambda student_logits, labels: 0, "takes student_logits, labels; a loss takes"),
        (lambda *arguments: 0, "takes nothing that is understood"),
        (torch.nn.Linear, "is a class"),
        (torch.add, "no signature found .*; wrap it in a function"),
    ],
)
def test_a_signature_that_is_no_loss_is_refused_by_name(loss, message):
    with pytest.raises(ConfigError, match=message):
        of(loss, "loss")


@pytest.mark.parametrize("out", [torch.zeros(3), None, {"loss": 1.0}])
def test_a_loss_that_returns_no_scalar_is_refused(out):
    with pytest.raises(ConfigError, match="cannot be called"):
        str(of(lambda student_logits, teacher_logits: out, "loss"))


def test_what_a_target_raises_is_a_failure_and_nan_holds_nowhere():
    target = of(defects.right_dense, "right")

    def broken(_):
        yield equal("a number", 0.0, 0.0, within=0.0)
        raise KeyError("lost")

    verdict = judge(Check("broken", "", broken), target)
    assert (verdict.status, verdict.reason) == ("failed", "raised KeyError: 'lost'")
    assert not equal("a number", 0.0, float("nan"), within=1.0).holds
    with pytest.raises(RuntimeError, match="compared nothing"):
        judge(Check("empty", "", lambda _: iter(())), target)


def test_definitions_equal_scipys():
    problem = draw(3, tokens=1)
    p, q = (scipy.special.softmax(x.numpy()[0]) for x in (problem.teacher_TV, problem.student_TV))
    expected = {
        "forward_kl": scipy.stats.entropy(p, q),
        "reverse_kl": scipy.stats.entropy(q, p),
        "plain_jsd": scipy.spatial.distance.jensenshannon(p, q) ** 2,
        "jsd": 4 * scipy.spatial.distance.jensenshannon(p, q) ** 2,
        "tvd": np.abs(p - q).sum() / 2,
        "skew_kl": scipy.stats.entropy(p, 0.1 * p + 0.9 * q),
        "skew_reverse_kl": scipy.stats.entropy(q, 0.1 * q + 0.9 * p),
    }
    log_p, log_q = (torch.log_softmax(x, 1) for x in (problem.teacher_TV, problem.student_TV))
    for name, value in expected.items():
        assert by_definition(name, log_p, log_q).item() == pytest.approx(value, rel=1e-12), name


def test_the_suites_own_samples_are_unbiased():
    tokens = 20_000
    problem = draw(5, tokens=1)
    problem = problem.take(torch.zeros(tokens, dtype=torch.long))
    evenly = (torch.arange(tokens, dtype=torch.float64)[:, None] + 0.5) / tokens
    ids, probs = problem.sampled(1.0, evenly)
    mean = torch.zeros(11, dtype=torch.float64).scatter_add_(0, ids.flatten(), probs.flatten()) / tokens
    torch.testing.assert_close(mean, torch.softmax(problem.teacher_TV[0], 0), rtol=0, atol=1e-4)
    torch.testing.assert_close(probs.sum(1), torch.ones(tokens, dtype=torch.float64))


def test_the_command_tells_by_its_exit_code_and_prints_only_json(capsys):
    arguments = ["--target", "tests.distill.defects:chatty", "--json", "--skip", "rank_count"]
    assert command.main(arguments) == DONE
    printed = json.loads(capsys.readouterr().out)
    assert printed["failed"] == 0 and printed["passed"] >= 10
    assert command.main([*arguments, "--declare", "divergence=reverse_kl"]) == NUMERICAL
    captured = capsys.readouterr()
    failed = [one for one in json.loads(captured.out)["parts"][0]["checks"] if one["status"] == "failed"]
    assert [one["check"] for one in failed] == ["definition"]
    assert failed[0]["got"] != pytest.approx(failed[0]["expected"], rel=0.01)
    assert captured.err.splitlines()[-1].startswith("error: failed: definition;")


def test_a_dry_run_says_how_a_target_was_understood(capsys):
    assert command.main(["--target", "tests.distill.defects:right_model_labels", "--dry-run"]) == DONE
    plan = json.loads(capsys.readouterr().out)
    assert "BTV float64; unshifted labels" in plan["targets"][0]
    assert plan["checks"] == list(suite.NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "tests.distill.defects"], "must be module:function"),
        (["--target", "tests.distill.defects:nothing"], "has no nothing"),
        (["--target", "no_such_module:loss"], "No module named 'no_such_module'; run from the folder"),
        (["--target", "tests.distill.defects:right_dense", "--only", "tail_mater"], "did you mean tail_matters?"),
        (["--target", "tests.distill.defects:right_dense", "--only", "tail_matters"], "no check applies"),
        (["--target", "tests.distill.defects:right_dense", "--declare", "label=aligned"], "did you mean labels?"),
        (["--target", "tests.distill.defects:right_dense", "--declare", "labels=shifted"], "use aligned, unshifted"),
        (["--target", "tests.distill.defects:right_dense", "--declare", "labels"], "must be KEY=VALUE"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert command.main(arguments) == USAGE
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_a_module_that_raises_while_it_is_imported_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_losses.py").write_text("raise ValueError('no such\\nkernel')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert command.main(["--target", "broken_losses:loss"]) == USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "broken_losses raises ValueError: no such" in line


def test_the_example_of_the_page_passes_from_another_folder(tmp_path):
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    assert len(example.splitlines()) <= 16
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "losses.py").write_text(example)
    words = [sys.executable, "-m", "distill.conformance", "--target", "my.losses:kd_loss"]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PAGE.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == DONE, done.stdout + done.stderr


def test_the_page_lists_every_check_under_its_defects():
    text = PAGE.read_text()
    rows = [re.split(r"\s*\|\s*", line)[1:-1] for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    listed = {int(row[0]): set(re.findall(r"`(\w+)`", row[-1])) for row in rows}
    named = {number: {check.name for check in suite.CHECKS if number in check.defects} for number in range(1, 18)}
    assert listed.keys() == named.keys()
    for number, names in named.items():
        assert names <= listed[number] <= names | {"rank_count", "paths_agree"}, number
    assert all(f"`{name}`" in text for name in suite.NAMES)
