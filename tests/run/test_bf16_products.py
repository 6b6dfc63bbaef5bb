"""bf16 products where the CPU has none: torch's values within one rounding, its errors, its other types untouched."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from herd.run import bf16_products


@pytest.fixture(scope="module", autouse=True)
def replaced():
    """The products in place on any CPU; afterwards torch's own where the product would have them."""
    bf16_products.replace(True)
    yield
    bf16_products.replace(bf16_products.are_slow())


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Within half a unit in the last of 8 bits, and what fp32 sums add to that."""
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    slack = exact.abs().double() * 2**-8 + 2e-4
    assert ((found.double() - exact.double()).abs() <= slack).all()


def assert_all_products_rounded_once(left_BMK: torch.Tensor, right_BKN: torch.Tensor) -> None:
    b, m, n = len(left_BMK), left_BMK.shape[1], right_BKN.shape[2]
    added_N, added_BMN = drawn(n, seed=2), drawn(b, m, n, seed=3)
    exact_BMN = left_BMK.double() @ right_BKN.double()
    scaled_BMN = 0.5 * added_BMN.double() + 2 * exact_BMN
    assert_rounded_once(torch.bmm(left_BMK, right_BKN), exact_BMN)
    assert_rounded_once(torch.baddbmm(added_N, left_BMK, right_BKN), added_N.double() + exact_BMN)
    out_BMN = torch.full_like(added_BMN, torch.nan)
    assert torch.baddbmm(added_BMN, left_BMK, right_BKN, beta=0.5, alpha=2, out=out_BMN) is out_BMN
    assert_rounded_once(out_BMN, scaled_BMN)
    assert_rounded_once(added_BMN.clone().baddbmm_(left_BMK, right_BKN, beta=0.5, alpha=2), scaled_BMN)
    for left_MK, right_KN, added_MN, exact_MN, scaled_MN in zip(
        left_BMK, right_BKN, added_BMN, exact_BMN, scaled_BMN, strict=True
    ):
        assert_rounded_once(left_MK @ right_KN, exact_MN)
        assert_rounded_once(torch.addmm(added_N, left_MK, right_KN), added_N.double() + exact_MN)
        out_MN = torch.full_like(added_MN, torch.nan)
        assert torch.mm(left_MK, right_KN, out=out_MN) is out_MN
        assert_rounded_once(out_MN, exact_MN)
        assert_rounded_once(added_MN.clone().addmm_(left_MK, right_KN, beta=0.5, alpha=2), scaled_MN)


sizes = st.integers(0, 9)


@given(b=st.integers(1, 4), m=sizes, k=sizes, n=sizes, flipped=st.booleans())
def test_products_of_any_shape_and_order_are_rounded_once(b, m, k, n, flipped):
    right_BKN = drawn(b, n, k, seed=1).transpose(1, 2) if flipped else drawn(b, k, n, seed=1)
    assert_all_products_rounded_once(drawn(b, m, k), right_BKN)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(("b", "m", "k", "n"), [(1, 900, 5000, 150), (40, 12, 700, 13)])
def test_what_is_larger_than_a_block_is_the_same(b, m, k, n, flipped):
    right_BKN = drawn(b, n, k, seed=1).transpose(1, 2) if flipped else drawn(b, k, n, seed=1)
    assert_all_products_rounded_once(drawn(b, m, k) / 16, right_BKN / 16)


def test_a_linear_layer_and_its_gradients_are_those_of_fp32_rounded():
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
    grad = drawn(1, 2, 16, 8, seed=5)
    results = []
    for three, dtype in (((query, key, value), torch.bfloat16), (exact, torch.float64)):
        given_mask = None if mask is None else mask.to(dtype)
        out = F.scaled_dot_product_attention(*three, attn_mask=given_mask, is_causal=not masked)
        out.backward(grad.to(dtype))
        results.append(out)
    assert results[0].dtype == torch.bfloat16
    torch.testing.assert_close(results[0].double(), results[1], rtol=2**-6, atol=2e-3)
    for one, other in zip((query, key, value), exact, strict=True):
        assert one.grad.dtype == torch.bfloat16
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0.03, atol=0.02)


def test_other_types_keep_torchs_own_results_to_the_bit():
    code = """
import torch
torch.manual_seed(0)
left, right, more = torch.randn(3, 9, 17), torch.randn(3, 17, 5), torch.randn(3, 9, 5)
for dtype in (torch.float32, torch.float64, torch.float16, torch.int64):
    a, b, c = left.mul(9).to(dtype), right.mul(9).to(dtype), more.mul(9).to(dtype)
    made = [a[0] @ b[0], a @ b, torch.addmm(c[0], a[0], b[0]), torch.baddbmm(c, a, b), c.clone().baddbmm_(a, b)]
    made += [c[0].clone().addmm_(a[0], b[0]), torch.mm(a[0], b[0], out=c[0].clone()), torch.bmm(a, b, out=c.clone())]
    print([one.double().sum().item().hex() for one in made])
"""
    ours = "from herd.run import bf16_products\nbf16_products.replace(True)"
    texts = [
        subprocess.run([sys.executable, "-c", first + code], capture_output=True, text=True, check=True, env=os.environ)
        for first in ("", ours)
    ]
    assert texts[0].stdout == texts[1].stdout and len(texts[0].stdout) > 400
    assert texts[0].stderr == texts[1].stderr == ""


@pytest.mark.parametrize(
    "call",
    [
        lambda: drawn(2, 3) @ drawn(4, 2),
        lambda: drawn(3, 4) @ drawn(5, 0),
        lambda: drawn(0, 4) @ drawn(5, 6),
        lambda: drawn(2, 3) @ torch.randn(3, 2),
        lambda: torch.mm(drawn(3), drawn(3, 2)),
        lambda: torch.bmm(drawn(1, 4, 5), drawn(3, 5, 2)),
        lambda: torch.addmm(drawn(7), drawn(4, 5), drawn(5, 2)),
        lambda: drawn(1, 6).addmm_(drawn(3, 4), drawn(4, 6)),
        lambda: drawn(1, 1, 6).baddbmm_(drawn(2, 3, 4), drawn(2, 4, 6)),
        lambda: torch.mm(drawn(3, 4), drawn(4, 2), out=torch.empty(3, 2, dtype=torch.int32)),
    ],
)
def test_what_torch_refuses_is_refused(call):
    with pytest.raises(RuntimeError):
        call()


def test_one_row_is_left_to_torch_and_is_right():
    row, weight = drawn(1, 40), drawn(30, 40, seed=1)
    exact = row.double() @ weight.double().T
    torch.testing.assert_close((row @ weight.T).double(), exact, rtol=2**-7, atol=0.05)
