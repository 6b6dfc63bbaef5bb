"""Losses and divergences against scipy in float64, whatever the micro-batch, the padding or the chunking."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from evals.rows import Rows
from evals.scores import score_rows
from herd.run.errors import ConfigError, NumericalError
from tests.evals.tiny import VOCABULARY, tiny_model, tiny_rows


def log_probabilities(model: torch.nn.Module, rows: Rows) -> np.ndarray:
    """log p [N, T, V], all rows in one forward, log-softmax by scipy in float64."""
    with torch.inference_mode():
        return log_softmax(model(input_ids=rows.input_ids_NT).logits.double().numpy(), axis=-1)


def expected_nats(logp_NTV: np.ndarray, rows: Rows) -> np.ndarray:
    labels_NT = rows.labels_NT.numpy()
    chosen_NT = np.take_along_axis(logp_NTV, np.maximum(labels_NT, 0)[..., None], axis=-1)[..., 0]
    return -np.where(labels_NT != -100, chosen_NT, 0.0).sum(axis=1)


def test_losses_equal_scipy_in_float64() -> None:
    model, rows = tiny_model(0), tiny_rows(1)
    scores = score_rows(model, rows)
    np.testing.assert_allclose(scores.nats_N, expected_nats(log_probabilities(model, rows), rows), rtol=1e-6)
    np.testing.assert_array_equal(scores.tokens_N, (rows.labels_NT != -100).sum(1).numpy())
    assert scores.divergence is None


def test_divergence_equals_scipy_in_float64() -> None:
    model, reference, rows = tiny_model(0), tiny_model(5), tiny_rows(1)
    divergence = score_rows(model, rows, reference=reference).divergence
    logp_NTV, logr_NTV = log_probabilities(model, rows), log_probabilities(reference, rows)
    scored_NT = (rows.labels_NT != -100).numpy()
    kl_NT = rel_entr(np.exp(logr_NTV), np.exp(logp_NTV)).sum(-1) * scored_NT
    agreed_NT = (logp_NTV.argmax(-1) == logr_NTV.argmax(-1)) & scored_NT
    assert kl_NT[scored_NT].min() > 0.1  # the two models do differ
    np.testing.assert_allclose(divergence.kl_N, kl_NT.sum(1), rtol=1e-5)
    np.testing.assert_allclose(np.sort(divergence.kl_M), np.sort(kl_NT[scored_NT]), rtol=1e-5)
    np.testing.assert_array_equal(divergence.agreed_N, agreed_NT.sum(1))
    np.testing.assert_allclose(divergence.nats_N, expected_nats(logr_NTV, rows), rtol=1e-6)


def test_a_model_does_not_diverge_from_itself() -> None:
    model, rows = tiny_model(0), tiny_rows(1)
    scores = score_rows(model, rows, reference=model)
    assert np.all(scores.divergence.kl_M == 0)
    np.testing.assert_array_equal(scores.divergence.agreed_N, scores.tokens_N)
    np.testing.assert_array_equal(scores.divergence.nats_N, scores.nats_N)


@pytest.mark.parametrize("micro_rows", [1, 3, 7, 100])
def test_the_micro_batch_does_not_matter(micro_rows: int) -> None:
    model, reference, rows = tiny_model(0), tiny_model(5), tiny_rows(1)
    expected = score_rows(model, rows, reference=reference, micro_rows=2)
    scores = score_rows(model, rows, reference=reference, micro_rows=micro_rows)
    np.testing.assert_allclose(scores.nats_N, expected.nats_N, rtol=1e-6)
    np.testing.assert_allclose(scores.divergence.kl_M, expected.divergence.kl_M, rtol=1e-4)
    np.testing.assert_array_equal(scores.divergence.agreed_N, expected.divergence.agreed_N)


def test_no_forward_sees_more_than_a_micro_batch() -> None:
    model, reference, rows = tiny_model(0), tiny_model(5), tiny_rows(1)
    seen: list[int] = []
    for judged in (model, reference):
        judged.lm_head.register_forward_hook(lambda _, __, logits_BTV: seen.append(len(logits_BTV)))
    score_rows(model, rows, reference=reference, micro_rows=3)
    assert seen == [3, 3, 3, 3, 1, 1]


def test_a_vocabulary_larger_than_a_chunk_is_scored_alike() -> None:
    model, rows = tiny_model(0, vocabulary=20_011), tiny_rows(1, vocabulary=20_011)
    scores = score_rows(model, rows, reference=tiny_model(5, vocabulary=20_011))
    np.testing.assert_allclose(scores.nats_N, expected_nats(log_probabilities(model, rows), rows), rtol=1e-6)
    assert len(scores.divergence.kl_M) == scores.tokens_N.sum()


def test_padded_vocabularies_are_compared_on_the_ids_both_have() -> None:
    model, rows = tiny_model(0), tiny_rows(1)
    padded = tiny_model(5, vocabulary=VOCABULARY + 64)
    divergence = score_rows(model, rows, reference=padded).divergence
    with torch.inference_mode():
        logr_NTV = log_softmax(padded(input_ids=rows.input_ids_NT).logits[..., :VOCABULARY].double().numpy(), axis=-1)
    kl_NT = rel_entr(np.exp(logr_NTV), np.exp(log_probabilities(model, rows))).sum(-1)
    np.testing.assert_allclose(divergence.kl_N, (kl_NT * (rows.labels_NT != -100).numpy()).sum(1), rtol=1e-5)
    np.testing.assert_allclose(divergence.nats_N, expected_nats(log_probabilities(padded, rows), rows), rtol=1e-6)


def test_a_broken_model_is_named_with_its_row() -> None:
    model = tiny_model(0)
    torch.nn.init.constant_(model.lm_head.weight[7:8], float("nan"))
    with pytest.raises(NumericalError, match="row 0"):
        score_rows(model, tiny_rows(1))


def test_rows_longer_than_the_model_reads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sequence_length = 24.*at most 16"):
        score_rows(tiny_model(0, longest=16), tiny_rows(1))
