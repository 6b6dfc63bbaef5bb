"""Every divergence against its definition under float64 autograd, and the properties all of them have."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses.divergences import NAMES, PARAMETERS, divergence
from herd.run.errors import ConfigError
from tests.distill.definitions import by_definition

CASES = [(name, parameter) for name in NAMES for parameter in ((0.1, 0.5, 0.9) if name in PARAMETERS else (None,))]


def make_pair(seed, tokens=4, classes=11, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    z, t = torch.randn(2, tokens, classes, generator=generator, dtype=torch.float64) * spread
    return z, t


def ours(name, parameter, z, t):
    return divergence(name, parameter)(torch.log_softmax(z, 1), torch.log_softmax(t, 1))


@pytest.mark.parametrize(("name", "parameter"), CASES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.1, 1.0, 5.0]))
def test_value_and_gradient_equal_float64_autograd(name, parameter, seed, spread):
    z, t = make_pair(seed, spread=spread)
    z.requires_grad_()
    expected = by_definition(name, parameter, z, t)
    slope = torch.autograd.grad(expected.sum(), z)[0]
    value, gradient = ours(name, parameter, z.detach(), t)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("name", "parameter"), CASES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_non_negative_zero_at_identity_and_blind_to_a_constant(name, parameter, seed):
    z, t = make_pair(seed)
    value, gradient = ours(name, parameter, z, t)
    assert (value >= 0).all() and (value > 1e-6).any()
    assert gradient.sum(1).abs().max() < 1e-12
    shifted, _ = ours(name, parameter, z + 7, t - 3)
    torch.testing.assert_close(shifted, value)
    same, nothing = ours(name, parameter, z, z)
    assert same.abs().max() < 1e-12 and nothing.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_normalised_jsd_is_continuous_at_both_ends(dtype):
    z, t = (x.to(dtype) for x in make_pair(3, spread=1.0))
    for end, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        limit, slope = ours(name, None, z, t)
        near, near_slope = ours("jsd", abs(end - 1e-5), z, t)
        torch.testing.assert_close(near, limit, rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(near_slope, slope, rtol=5e-3, atol=1e-3)
        exact, _ = ours("jsd", end, z, t)
        torch.testing.assert_close(exact, limit, rtol=0, atol=0)


@given(seed=st.integers(0, 10_000), skew=st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_bounds_hold(seed, skew):
    z, t = make_pair(seed, spread=8.0)
    forward, total = ours("forward_kl", None, z, t)[0], ours("tvd", None, z, t)[0]
    assert (total.square() <= forward / 2 + 1e-12).all()  # Pinsker
    assert (ours("skew_kl", skew, z, t)[0] <= -math.log(skew) + 1e-12).all()
    entropy = -skew * math.log(skew) - (1 - skew) * math.log1p(-skew)
    assert (ours("jsd", skew, z, t)[0] <= entropy / (skew * (1 - skew)) + 1e-12).all()


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_classes_without_mass_on_either_side_leave_everything_finite(name, parameter):
    z, t = (x.float() for x in make_pair(1, classes=6))
    t[:, 2] = -torch.inf
    z[:, 3] = -1e9
    value, gradient = divergence(name, parameter)(torch.log_softmax(z, 1), torch.log_softmax(t, 1))
    assert value.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("name", "parameter", "message"),
    [
        ("kl", None, "unknown; use one of forward_kl"),
        ("tvd", 0.3, "tvd has none"),
        ("jsd", 1.5, r"must be in \[0, 1\]"),
        ("skew_kl", 1.0, "zero everywhere at 1"),
    ],
)
def test_what_does_not_exist_is_refused(name, parameter, message):
    with pytest.raises(ConfigError, match=message):
        divergence(name, parameter)
