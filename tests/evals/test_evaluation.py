"""A whole evaluation of a folder: its numbers are those of the parts, its intervals hold them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from evals.evaluation import check_tokenizers, check_tokens, evaluate, read_scheme
from evals.loading import load
from evals.probe import Probe
from evals.scores import score_rows
from herd.run.errors import ConfigError, DataError
from herd.run.lineage import write_lineage
from tests.evals.tiny import save_tiny, tiny_model, tiny_rows


@pytest.fixture(scope="module")
def probe():
    with Probe() as running:
        yield running


def test_an_evaluation_reports_the_sums_of_its_rows(tmp_path: Path, probe: Probe) -> None:
    rows = tiny_rows(1)
    student, teacher = save_tiny(tmp_path / "scout", 0), save_tiny(tmp_path / "teacher", 5)
    write_lineage(student, role="student", name="scout", run_id="77aa")
    result = evaluate(student, rows=rows, against=teacher, decode_tokens=4, probe=probe)
    scores = score_rows(tiny_model(0), rows, reference=tiny_model(5))
    tokens = scores.tokens_N.sum()
    assert (result.name, result.role, result.reference, result.scheme) == ("scout", "student", "teacher", None)
    assert (result.rows, result.documents, result.tokens) == (7, 4, tokens)
    assert result.heldout_nats == pytest.approx(scores.nats_N.sum() / tokens, rel=1e-9)
    assert result.loss_difference == pytest.approx(result.heldout_nats - result.reference_nats, abs=1e-12)
    assert result.kl_mean == pytest.approx(scores.divergence.kl_M.mean(dtype=np.float64), rel=1e-6)
    assert result.kl_p99 == pytest.approx(np.quantile(scores.divergence.kl_M, 0.99), rel=1e-6)
    assert result.heldout_ci95.low < result.heldout_nats < result.heldout_ci95.high
    assert result.kl_mean_ci95.low < result.kl_mean < result.kl_mean_ci95.high
    assert result.peak_memory_bytes > 0 and result.decode_tokens_per_s > 0


def test_bits_per_byte_are_nats_over_bytes_and_ln_2(tmp_path: Path, probe: Probe) -> None:
    rows = tiny_rows(1)
    result = evaluate(save_tiny(tmp_path / "scout", 0), rows=rows, decode_tokens=0, probe=probe)
    bits = result.heldout_nats * result.tokens / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits / rows.bytes_N.sum(), rel=1e-12)
    assert result.decode_tokens_per_s is None and result.kl_mean is None


def test_a_folder_against_itself_diverges_by_nothing(tmp_path: Path, probe: Probe) -> None:
    folder = save_tiny(tmp_path / "scout", 0)
    result = evaluate(folder, rows=tiny_rows(1), against=load(folder), decode_tokens=0, probe=probe)
    assert (result.kl_mean, result.kl_p99, result.top1_agreement, result.loss_difference) == (0, 0, 1, 0)


def test_a_probe_outlives_a_model_it_cannot_measure(tmp_path: Path, probe: Probe) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_text("{}")
        probe.measure(tmp_path / "empty", [1, 2, 3])
    assert probe.measure(save_tiny(tmp_path / "scout", 0), [1, 2, 3], decode_tokens=2).decode_tokens_per_s > 0


def test_different_tokenizers_are_named(tmp_path: Path) -> None:
    one, other = load(save_tiny(tmp_path / "one", 0)), load(save_tiny(tmp_path / "other", 0, "<llama>"))
    with pytest.raises(DataError, match="llama"):
        check_tokenizers(one, other)


def test_rows_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="knows ids below 320"):
        check_tokens(load(save_tiny(tmp_path / "one", 0)), tiny_rows(1, vocabulary=5000))


@pytest.mark.parametrize(
    ("weights", "scheme"),
    [({"num_bits": 4, "type": "int"}, "int4"), ({"num_bits": 8, "type": "float"}, "fp8")],
)
def test_the_scheme_is_read_from_the_configuration(tmp_path: Path, weights: dict, scheme: str) -> None:
    groups = {"group_0": {"weights": weights}}
    content = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_scheme(tmp_path) == scheme
