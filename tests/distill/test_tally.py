"""What a step adds up to: bins of teacher entropy, means for the weighting, metrics, sums over ranks."""

import pytest
import torch

from distill.loop import of_model
from distill.losses.kernel import STATS
from distill.tally import TALLIED, Tally
from distill.weighting import entropy_bins


def statistics(tokens, seed=0):
    """Random statistics [S, T] whose `absent` is 0."""
    stats_ST = torch.rand(len(STATS), tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    stats_ST[STATS.index("teacher_entropy")] *= 8
    stats_ST[STATS.index("absent")] = 0
    return stats_ST


def row(stats_ST, name):
    return stats_ST[STATS.index(name)]


def tally_of(*parts):
    tally = Tally(top_k=1)
    for stats_ST, valid_T in parts:
        tally.add(stats_ST.masked_fill(~valid_T, 0.0), valid_T, [])
    return tally


def test_bins_hold_the_means_of_their_own_tokens_and_add_up_to_the_whole():
    stats_ST, valid_T = statistics(200), torch.arange(200) % 7 > 0
    row(stats_ST, "absent")[::5] = 1
    stats = tally_of((stats_ST[:, :90], valid_T[:90]), (stats_ST[:, 90:], valid_T[90:])).step_stats(3)
    used_T = valid_T & (row(stats_ST, "absent") == 0)
    bin_T = entropy_bins.of(row(stats_ST, "teacher_entropy"))
    assert stats.step == 3 and len(stats.bins) == entropy_bins.COUNT
    for index, of_bin in [(None, stats), *enumerate(stats.bins)]:
        inside_T = used_T if index is None else used_T & (bin_T == index)
        assert of_bin.count == inside_T.sum()
        for name, stat in TALLIED.items():
            expected = row(stats_ST, stat)[inside_T].mean().item() if inside_T.any() else 0.0
            assert getattr(of_bin, name) == pytest.approx(expected, rel=1e-12)
    expected = (-row(stats_ST, "teacher_ce")[used_T]).exp().mean().item()
    assert stats.label_mass == pytest.approx(expected, rel=1e-12)
    assert sum(of_bin.count for of_bin in stats.bins) == stats.count


def test_an_edge_belongs_to_the_bin_below_it_and_every_bin_has_a_name():
    edges_E = torch.tensor(entropy_bins.EDGES, dtype=torch.float64)
    assert entropy_bins.of(edges_E).tolist() == list(range(len(edges_E)))
    assert entropy_bins.of(edges_E + 1e-9).tolist() == list(range(1, len(edges_E) + 1))
    assert entropy_bins.of(torch.tensor([0.0, 1e9])).tolist() == [0, entropy_bins.COUNT - 1]
    assert len(set(entropy_bins.NAMES)) == entropy_bins.COUNT


def test_alpha_by_entropy_is_none_for_bins_without_tokens_and_reaches_mlflow_as_scalars():
    stats_ST, valid_T = statistics(50), torch.ones(50, dtype=torch.bool)
    row(stats_ST, "teacher_entropy").clamp_(0.6, 1.2)
    metrics = tally_of((stats_ST, valid_T)).metrics("student/scout", with_targets=True)
    by_entropy = metrics["student/scout/alpha_by_entropy"]
    assert [alpha is not None for alpha in by_entropy] == [0.5 <= low <= 1.0 for low in (0.0, *entropy_bins.EDGES)]
    inside_T = row(stats_ST, "teacher_entropy") <= 1.0
    assert by_entropy[3] == pytest.approx(row(stats_ST, "alpha")[inside_T].mean().item())
    sent = of_model(metrics, "scout")
    assert sent["train/alpha_by_entropy/0.5-1"] == by_entropy[3]
    assert "train/alpha_by_entropy/0-0.05" not in sent
    shares = [sent[key] for key in sent if key.startswith("train/alpha_histogram/")]
    assert len(shares) == 10 and sum(shares) == pytest.approx(1.0)
    assert sent["train/alpha_histogram/0.9-1"] == pytest.approx((row(stats_ST, "alpha") >= 0.9).double().mean().item())
