"""What the codecs keep, against masses in float64 and formulas of survey sampling; the bytes, against themselves.

Run: pytest tests/teachers/test_codecs.py
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.run.errors import ConfigError, DataError, NumericalError
from teachers.cache.codecs import Kept, encode_rows, parse, rice, sets
from teachers.cache.codecs.densify import sparse_targets
from teachers.cache.codecs.draws import uniforms
from teachers.cache.codecs.head_and_tail import SPREAD
from teachers.targets import DenseTargets, LinearTargets, SparseTargets
from tests.teachers.samples import peaked_logits

ALL = ("head_and_tail=6", "rs_kd=9", "top_k=5")
UNBIASED = ("head_and_tail=6", "rs_kd=9")
EDGE_IDS = (0, 65_535, 65_536, 131_071, 131_072, 202_047)


def encode_kept(codec: str, logits_TV: torch.Tensor, rows: int, *, labels_T=None, key=0, **settings) -> list[Kept]:
    """Encode to bytes and decode, row by row."""
    length, vocabulary = len(logits_TV) // rows, logits_TV.shape[1]
    labels_T = torch.zeros(len(logits_TV), dtype=torch.long) if labels_T is None else labels_T
    keys_B = torch.arange(rows) + key
    payloads = encode_rows(
        parse(codec), DenseTargets(logits_TV), labels_T.view(rows, length), keys_B, vocabulary=vocabulary, **settings
    )
    return [Kept.from_bytes(data, num_tokens=length, vocabulary=vocabulary) for data in payloads]


def encode(codec: str, logits_TV: torch.Tensor, rows: int = 1, **settings) -> SparseTargets:
    """The same, laid out as a loss sees it."""
    kept = encode_kept(codec, logits_TV, rows, **settings)
    temperature = settings.get("temperature", 1.0)
    return sparse_targets(kept, len(logits_TV) // rows, tail=parse(codec).tail, temperature=temperature)


def dense(targets: SparseTargets, vocabulary: int) -> torch.Tensor:
    """fp64 [T, V] of the listed masses."""
    out_TV = torch.zeros(targets.num_tokens, vocabulary, dtype=torch.float64)
    return out_TV.scatter_add_(1, targets.ids_TK.clamp_min(0), targets.probs_TK.double())


def thresholds(p_V: np.ndarray, kept: int) -> tuple[np.ndarray, float]:
    """Which classes threshold sampling of `kept` of them takes for certain, and the threshold; by trying all."""
    order = np.argsort(-p_V)
    for heads in range(kept):
        threshold = p_V[order[heads:]].sum() / (kept - heads)
        if p_V[order[heads]] <= threshold:
            break
    return order[:heads], threshold


def squared_error(p_V: np.ndarray, kept: int, units: int) -> float:
    """E||t - p||^2 of one token: s r - sum of tail p^2, and the variance of rounding to whole units."""
    head, threshold = thresholds(p_V, kept)
    tail = np.delete(p_V, head)
    spread = lambda mass: (mass * units % 1) * (1 - mass * units % 1) / units**2  # noqa: E731
    sampled = threshold * tail.sum() - (tail**2).sum() + spread(tail.sum()) / (kept - len(head))
    return sampled + sum(spread(mass) for mass in p_V[head])


@given(
    st.lists(st.lists(st.integers(0, 5000), max_size=30), min_size=1, max_size=6),
    st.lists(st.integers(0, 9), min_size=6, max_size=6),
)
def test_rice_codes_give_back_every_stream(streams, shifts):
    streams = [rice.Stream(np.array(values, dtype=np.int64), shift) for values, shift in zip(streams, shifts)]  # noqa: B905
    shapes = [(len(stream.values_N), stream.shift) for stream in streams]
    for stream, back in zip(streams, rice.decode(rice.encode(streams), shapes), strict=True):
        np.testing.assert_array_equal(back, stream.values_N)


@given(st.data())
def test_sets_give_back_their_members(data):
    vocabulary, tokens = data.draw(st.integers(1, 300_000)), data.draw(st.integers(1, 40))
    pairs = st.tuples(st.integers(0, tokens - 1), st.integers(0, vocabulary - 1))
    members = np.array(sorted(data.draw(st.sets(pairs, max_size=60))), dtype=np.int64).reshape(-1, 2)
    back = sets.join(sets.split(*members.T, vocabulary=vocabulary), vocabulary=vocabulary)
    order = sets.order(*members.T, vocabulary=vocabulary)
    np.testing.assert_array_equal(np.stack(back, 1), members[order])


def test_a_set_costs_little_more_than_its_share_of_all_sets_of_its_size():
    vocabulary, tokens, size = 202_048, 256, 14
    generator = np.random.default_rng(0)
    ids_N = np.concatenate([generator.choice(vocabulary, size, replace=False) for _ in range(tokens)])
    none = np.zeros(0, dtype=np.int64)
    kept = Kept(
        none, none, none, np.repeat(np.arange(tokens), size), ids_N, np.ones(2, int), np.zeros(tokens), np.zeros(tokens)
    )
    bits = (
        8 * (len(kept.to_bytes(vocabulary=vocabulary)) - tokens * 2 / 8) / (tokens * size)
    )  # entropy and CE: a bit each
    bound = (
        (math.lgamma(vocabulary + 1) - math.lgamma(size + 1) - math.lgamma(vocabulary - size + 1)) / math.log(2) / size
    )
    assert bound < bits < bound + 0.4
    assert bits < 18 - 2.3  # eighteen bits is what an id of this vocabulary takes


@pytest.mark.parametrize("codec", ALL)
def test_ids_beyond_16_and_17_bits_come_back(codec):
    logits_TV = torch.full((3, 202_048), -30.0)
    logits_TV[:, EDGE_IDS] = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    targets = encode(codec.replace("=5", "=6"), logits_TV)
    assert set(targets.ids_TK.flatten().tolist()) - {-1} <= set(EDGE_IDS)
    if codec != "rs_kd=9":  # which draws some of them only
        for token in range(3):
            assert set(targets.ids_TK[token].tolist()) - {-1} == set(EDGE_IDS)


@pytest.mark.parametrize("codec", UNBIASED)
def test_masses_are_unbiased_and_their_error_is_what_the_formula_says(codec):
    shapes, draws, vocabulary = 4, 2048, 40
    logits_SV = peaked_logits(shapes, vocabulary, seed=3)
    logits_TV = logits_SV.repeat(draws, 1)
    targets = encode(codec, logits_TV, rows=2, key=77)
    p_SV = logits_SV.double().softmax(-1)
    drawn_DSV = dense(targets, vocabulary).view(draws, shapes, vocabulary)
    mean_SV, size = drawn_DSV.mean(0), parse(codec).size
    errors_S = ((drawn_DSV - p_SV) ** 2).sum(-1).mean(0)
    (units,) = {int(total) for total in encode_kept(codec, logits_TV[:256], 1)[0].totals_B}
    for token, p_V in enumerate(p_SV.numpy()):
        if codec.startswith("rs_kd"):
            expected, variance_V = (1 - (p_V**2).sum()) / size, p_V * (1 - p_V) / size
        else:
            kept = int((targets.ids_TK.view(draws, shapes, -1)[:, token] >= 0).sum(-1).max())
            expected, variance_V = squared_error(p_V, kept, units), p_V * thresholds(p_V, kept)[1] + 0.25 / units**2
        once = 1 / (size * draws)  # what one draw moves a mean by: rare classes are far from normal
        assert np.all(np.abs(mean_SV[token].numpy() - p_V) < 4 * np.sqrt(variance_V / draws) + 2 * once)
        assert float(errors_S[token]) == pytest.approx(expected, rel=0.1)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(UNBIASED), st.sampled_from([0.01, 1.0, 30.0]))
def test_sampled_targets_list_each_class_once_and_sum_to_one(seed, codec, sharpness):
    targets = encode(codec, peaked_logits(20, 70, seed=seed) * sharpness, key=seed)
    assert targets.tail == "sampled" and targets.present_T is None
    torch.testing.assert_close(targets.probs_TK.sum(-1), torch.ones(20), rtol=0, atol=1e-6)
    for ids_K in targets.ids_TK.tolist():
        listed = [id for id in ids_K if id >= 0]
        assert len(listed) == len(set(listed)) > 0
    assert torch.equal(targets.ids_TK < 0, targets.probs_TK == 0)


def test_head_and_tail_is_never_worse_than_as_many_random_draws():
    logits_TV = peaked_logits(128, 300, seed=5)
    p_TV = logits_TV.double().softmax(-1).numpy()
    for size in (2, 4, 8, 16):
        error = np.mean([squared_error(p_V, size, 1 << 20) for p_V in p_TV])
        keys = range(6)
        drawn = [dense(encode(f"head_and_tail={size}", logits_TV, key=key), 300).numpy() for key in keys]
        measured = np.mean([((t_TV - p_TV) ** 2).sum(-1).mean() for t_TV in drawn])
        random = (1 - (p_TV**2).sum(-1)).mean() / size
        assert measured < 1.03 * error < random  # one threshold for a block beats one for each token


@pytest.mark.parametrize("size", [3, 16])
def test_head_and_tail_keeps_the_same_mean_number_of_classes_whatever_the_teacher(size):
    for sharpness in (0.2, 1.0, 3.0):
        targets = encode(f"head_and_tail={size}", sharpness * peaked_logits(128, 400, seed=1))
        assert (targets.ids_TK >= 0).sum() == pytest.approx(size * 128, rel=0.04)
        assert targets.ids_TK.shape[1] <= SPREAD * size


def test_top_k_keeps_the_largest_and_the_mass_of_the_rest():
    logits_TV = peaked_logits(64, 90, seed=2)
    targets = encode("top_k=8", logits_TV)
    p_TV = logits_TV.double().softmax(-1)
    kept_TV = dense(targets, 90)
    largest_TV = torch.zeros_like(p_TV).scatter_(1, p_TV.topk(8).indices, p_TV.topk(8).values)
    assert targets.tail == "bucket"
    torch.testing.assert_close(kept_TV, largest_TV, rtol=0, atol=1 / 4096)
    assert bool((targets.probs_TK.sum(-1) <= 1).all())


@pytest.mark.parametrize("codec", ALL)
def test_masses_are_tempered_and_the_cross_entropy_is_not(codec):
    logits_TV = torch.tensor([[3.0, 1.0, -2.0, 0.5]]).repeat(400, 1)
    labels_T = torch.full((400,), 1)
    labels_T[5] = -100
    targets = encode(codec.replace("=5", "=4"), logits_TV, labels_T=labels_T, temperature=2.0)
    p_V = (logits_TV[0].double() / 2).softmax(-1)
    torch.testing.assert_close(dense(targets, 4).mean(0), p_V, rtol=0, atol=0.03)
    assert targets.temperature == 2.0
    torch.testing.assert_close(targets.entropy_T[0].double(), -(p_V * p_V.log()).sum(), rtol=0, atol=1 / 64)
    ce = -logits_TV[0].log_softmax(-1)[1]
    torch.testing.assert_close(targets.ce_T[0], ce, rtol=0, atol=1 / 128 + 1e-6)
    assert targets.ce_T[5] == 0


@pytest.mark.parametrize("codec", ALL)
def test_entropy_and_cross_entropy_are_the_teachers_own(codec):
    logits_TV, labels_T = peaked_logits(200, 60, seed=8), torch.arange(200) % 60
    targets = encode(codec, logits_TV, labels_T=labels_T)
    logs_TV = logits_TV.double().log_softmax(-1)
    ce_T = -logs_TV.gather(1, labels_T[:, None])[:, 0]
    torch.testing.assert_close(targets.ce_T.double(), ce_T, rtol=0, atol=1 / 128 + 1e-6)
    torch.testing.assert_close(
        targets.entropy_T.double(), -(logs_TV.exp() * logs_TV).sum(-1), rtol=0, atol=1 / 64 + 1e-6
    )


@pytest.mark.parametrize("codec", ALL)
def test_a_row_has_the_same_bytes_alone_among_others_and_from_hidden_states(codec):
    generator = torch.Generator().manual_seed(1)
    hidden_TG, head_VG = torch.randn(3 * 150, 8, generator=generator), torch.randn(60, 8, generator=generator)
    labels_BT, keys_B = torch.zeros(3, 150, dtype=torch.long), torch.tensor([5, -6, 2**62])
    linear, size = LinearTargets(hidden_TG, head_VG), {"vocabulary": 60}
    together = encode_rows(parse(codec), linear, labels_BT, keys_B, **size)
    assert together == encode_rows(parse(codec), linear, labels_BT, keys_B, **size)
    alone = encode_rows(parse(codec), DenseTargets(linear.logits(slice(150, 300))), labels_BT[1:2], keys_B[1:2], **size)
    assert alone == together[1:2]
    assert encode_rows(parse(codec), linear, labels_BT, keys_B, seed=1, **size) != together
    assert encode_rows(parse(codec), linear, labels_BT, keys_B + 1, **size) != together


@pytest.mark.parametrize("codec", ALL)
def test_classes_a_model_rules_out_have_no_mass(codec):
    logits_TV = peaked_logits(40, 64, seed=4)
    logits_TV[:, 50:] = -torch.inf  # how padded vocabularies are masked
    logits_TV[7, 1:] = -torch.inf
    targets = encode(codec, logits_TV)
    assert int(targets.ids_TK.max()) < 50
    assert dense(targets, 64)[7].tolist() == [1.0] + [0.0] * 63
    assert bool(targets.entropy_T.isfinite().all()) and targets.entropy_T[7] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_named_by_row_and_token(bad):
    logits_TV = peaked_logits(300, 30)
    logits_TV[205, 3] = bad
    with pytest.raises(NumericalError, match=r"row 1 \(key 42\), block of tokens from 0: teacher logits of token 55 "):
        encode("rs_kd=3", logits_TV, rows=2, key=41)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="top_k=31 is more than the vocabulary of 30"):
        encode("top_k=31", peaked_logits(5, 30))
    with pytest.raises(DataError, match="logits of 30 classes, the cache is of 31"):
        encode_rows(
            parse("rs_kd=3"), DenseTargets(peaked_logits(5, 30)), torch.zeros(1, 5), torch.zeros(1), vocabulary=31
        )
    for text in ("top_k", "top_k=0", "top_k=-1", "best=3", "head_and_tail=x"):
        with pytest.raises(ConfigError, match="must be one of head_and_tail=N, rs_kd=N, top_k=N"):
            parse(text)


def test_bytes_cut_short_are_refused():
    payload = encode_rows(
        parse("head_and_tail=4"),
        DenseTargets(peaked_logits(20, 50)),
        torch.zeros(1, 20).long(),
        torch.zeros(1).long(),
        vocabulary=50,
    )[0]
    for length in range(len(payload)):
        with pytest.raises(DataError, match="ends"):
            Kept.from_bytes(payload[:length], num_tokens=20, vocabulary=50)


def test_random_numbers_are_even_and_differ_between_rows_tokens_and_streams():
    drawn = uniforms(-3, np.arange(4000), stream=0, count=5)
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43  # chi squared, 19 degrees of freedom, one in a thousand
    assert len(np.unique(drawn)) == drawn.size
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.03
    for other in (uniforms(-2, np.arange(4000), stream=0, count=5), uniforms(-3, np.arange(4000), stream=1, count=5)):
        assert not np.isin(drawn, other).any()
    np.testing.assert_array_equal(uniforms(-3, np.arange(10, 20), stream=0, count=2), drawn[10:20, :2])


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ALL)
def test_on_an_accelerator_the_same_draws_give_the_same_targets(codec):
    logits_TV, labels_BT = peaked_logits(200, 300, seed=6), torch.arange(200)[None]
    keys_B, size = torch.tensor([9]), {"vocabulary": 300}
    kept = [
        Kept.from_bytes(
            encode_rows(parse(codec), DenseTargets(logits_TV.to(device)), labels_BT.to(device), keys_B, **size)[0],
            num_tokens=200,
            vocabulary=300,
        )
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(kept[0].ce_T, kept[1].ce_T, atol=1 / 32)
    members = [set(zip(row.tokens_H.tolist(), row.ids_H.tolist(), strict=True)) for row in kept]
    assert len(members[0] & members[1]) > 0.97 * len(members[0] | members[1])  # rounding may differ at an edge
