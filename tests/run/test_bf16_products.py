"""bf16 products where the CPU has none: torch's values within one rounding, its errors, its other types untouched."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from herd.run import bf16_products


@pytest.fixture(scope="module", autouse=True)
def replaced():
    """The products in place on any CPU, for this module alone."""
    library = bf16_products.replace()
    yield
    library._destroy()


@pytest.fixture
def tiny_blocks(monkeypatch):
    monkeypatch.setattr(bf16_products, "BLOCK", 64)
    monkeypatch.setattr(bf16_products, "TALL", 3)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Within half a unit in the last of 8 bits, and what fp32 sums add to that."""
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    slack = exact.abs().double() * 2**-8 + 1e-5
    assert ((found.double() - exact.double()).abs() <= slack).all()


sizes = st.integers(0, 9)


@given(b=st.integers(0, 4), m=sizes, k=sizes, n=sizes, flipped=st.booleans())
def test_products_are_rounded_once_in_blocks_of_any_size(b, m, k, n, flipped):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bf16_products, "BLOCK", 16)
        patch.setattr(bf16_products, "TALL", 2)
        left_BMK = drawn(b, m, k)
        right_BKN = drawn(b, n, k, seed=1).transpose(1, 2) if flipped else drawn(b, k, n, seed=1)
        added_N = drawn(n, seed=2)
        exact_BMN = left_BMK.double() @ right_BKN.double()
        assert_rounded_once(torch.bmm(left_BMK, right_BKN), exact_BMN)
        assert_rounded_once(
            torch.baddbmm(added_N, left_BMK, right_BKN, beta=0.5, alpha=2), 0.5 * added_N.double() + 2 * exact_BMN
        )
        for left_MK, right_KN, exact_MN in zip(left_BMK, right_BKN, exact_BMN, strict=True):
            assert_rounded_once(left_MK @ right_KN, exact_MN)
            assert_rounded_once(torch.addmm(added_N, left_MK, right_KN), added_N.double() + exact_MN)
            out_MN = drawn(m, n, seed=3)
            assert torch.mm(left_MK, right_KN, out=out_MN) is out_MN
            assert_rounded_once(out_MN, exact_MN)
            sum_MN = drawn(m, n, seed=3)
            wanted_MN = sum_MN.double() + exact_MN
            assert_rounded_once(sum_MN.addmm_(left_MK, right_KN), wanted_MN)


def test_a_linear_layer_and_its_gradients_are_those_of_fp32_rounded(tiny_blocks):
    input_TH, weight_OH, bias_O = (drawn(*shape).requires_grad_() for shape in ((7, 11), (5, 11), (5,)))
    exact = [one.detach().double().requires_grad_() for one in (input_TH, weight_OH, bias_O)]
    grad_TO = drawn(7, 5, seed=4)
    F.linear(input_TH, weight_OH, bias_O).backward(grad_TO)
    F.linear(*exact).backward(grad_TO.double())
    for mine, theirs in zip((input_TH, weight_OH), exact, strict=False):
        assert_rounded_once(mine.grad, theirs.grad)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients_are_as_near_to_float64_as_bf16_is(masked):
    query, key, value = (drawn(1, 2, 16, 8, seed=n).requires_grad_() for n in range(3))
    exact = [one.detach().double().requires_grad_() for one in (query, key, value)]
    mask = torch.zeros(16, 16).masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf) if masked else None
    mine = F.scaled_dot_product_attention(
        query, key, value, attn_mask=None if mask is None else mask.bfloat16(), is_causal=not masked
    )
    theirs = F.scaled_dot_product_attention(
        *exact, attn_mask=None if mask is None else mask.double(), is_causal=not masked
    )
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine.double(), theirs, rtol=2**-7, atol=1e-3)
    grad = drawn(1, 2, 16, 8, seed=5)
    mine.backward(grad)
    theirs.backward(grad.double())
    for one, other in zip((query, key, value), exact, strict=True):
        assert one.grad.dtype == torch.bfloat16
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0.03, atol=0.02)


def test_other_types_keep_torchs_own_results_to_the_bit():
    left, right = torch.randn(9, 17), torch.randn(17, 5)
    assert torch.equal(left @ right, torch.addmm(torch.zeros(5), left, right))
    assert (left.double() @ right.double()).dtype == torch.float64
    assert ((torch.ones(2, 3, dtype=torch.int64) @ torch.ones(3, 2, dtype=torch.int64)) == 3).all()


def test_shapes_and_types_that_do_not_fit_are_refused_as_before():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        drawn(2, 3) @ drawn(4, 2)
    with pytest.raises(RuntimeError, match="same dtype"):
        drawn(2, 3) @ torch.randn(3, 2)


def test_one_row_is_left_to_torch_and_is_right():
    row, weight = drawn(1, 40), drawn(30, 40, seed=1)
    exact = row.double() @ weight.double().T
    torch.testing.assert_close((row @ weight.T).double(), exact, rtol=2**-7, atol=0.05)
