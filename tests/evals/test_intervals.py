"""Intervals cover the truth at the rate they promise, in seeded simulations of documents of uneven length."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.intervals import bootstrap_ratio, group_rows

TRUTH = 4.2
TRIALS = 400


def simulate(generator: np.random.Generator, documents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(nats, tokens, document) per row: 1 to 9 rows a document, losses of a document's rows share its difficulty."""
    rows_D = generator.integers(1, 10, documents)
    document_N = np.repeat(np.arange(documents), rows_D)
    difficulty_D = 0.5 * generator.standard_normal(documents)
    loss_N = TRUTH + difficulty_D[document_N] + 0.15 * generator.standard_normal(len(document_N))
    return 256 * loss_N, np.full(len(document_N), 256.0), document_N


def coverage(documents: int, *, grouped: bool) -> float:
    """Share of simulated held-out sets whose interval holds the truth."""
    generator = np.random.default_rng(documents)
    covered = 0
    for trial in range(TRIALS):
        nats_N, tokens_N, document_N = simulate(generator, documents)
        groups = group_rows(document_N if grouped else np.arange(len(document_N)))
        interval = bootstrap_ratio(groups.sum(nats_N), groups.sum(tokens_N), seed=trial, resamples=1000)
        covered += interval.low <= TRUTH <= interval.high
    return covered / TRIALS


@pytest.mark.parametrize(("documents", "least"), [(10, 0.90), (30, 0.92), (100, 0.92)])
def test_intervals_over_documents_cover_the_truth_at_about_the_nominal_rate(documents: int, least: float) -> None:
    assert least <= coverage(documents, grouped=True) <= 0.985


def test_intervals_over_rows_would_promise_too_much() -> None:
    # Why documents are resampled: rows of a document are alike, so there is less evidence than there are rows.
    assert coverage(30, grouped=False) < 0.75


def test_width_equals_the_delta_method_for_many_documents() -> None:
    nats_N, tokens_N, document_N = simulate(np.random.default_rng(3), 2000)
    groups = group_rows(document_N)
    nats_G, tokens_G = groups.sum(nats_N), groups.sum(tokens_N)
    ratio = nats_G.sum() / tokens_G.sum()
    error = np.sqrt(np.sum((nats_G - ratio * tokens_G) ** 2)) / tokens_G.sum()
    interval = bootstrap_ratio(nats_G, tokens_G)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert (interval.high + interval.low) / 2 == pytest.approx(ratio, abs=0.1 * error)


def test_differences_are_paired() -> None:
    nats_N, tokens_N, document_N = simulate(np.random.default_rng(4), 30)
    groups = group_rows(document_N)
    worse_N = nats_N + 0.02 * tokens_N
    loss = bootstrap_ratio(groups.sum(nats_N), groups.sum(tokens_N))
    difference = bootstrap_ratio(groups.sum(worse_N - nats_N), groups.sum(tokens_N))
    assert loss.high - loss.low > 0.2
    assert difference == pytest.approx((0.02, 0.02), abs=1e-9)


def test_one_document_says_nothing_about_the_spread() -> None:
    assert bootstrap_ratio([900.0], [256.0]) is None


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=40), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_grouping_keeps_every_row_once(documents: list[str], seed: int) -> None:
    values_N = np.random.default_rng(seed).standard_normal(len(documents))
    sums_G = group_rows(documents).sum(values_N)
    assert len(sums_G) == len(set(documents))
    np.testing.assert_allclose(sums_G.sum(), values_N.sum(), atol=1e-9)


def test_the_same_seed_gives_the_same_interval_however_much_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nats_N, tokens_N, _ = simulate(np.random.default_rng(5), 40)
    whole = bootstrap_ratio(nats_N, tokens_N, seed=7)
    monkeypatch.setattr("evals.intervals._WEIGHTS_AT_ONCE", 1000)
    assert bootstrap_ratio(nats_N, tokens_N, seed=7) == pytest.approx(whole, rel=1e-12)
    assert bootstrap_ratio(nats_N, tokens_N, seed=8) != whole
