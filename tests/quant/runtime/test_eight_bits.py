"""FP8 and W8A8 for serving: bit tricks against torch's own casts, products against exact sums."""

import pytest
import torch

from quant.formats import fp8 as fp8_format
from quant.formats import int8 as int8_format
from quant.formats.format import Ranges
from quant.runtime.crossovers import Crossovers
from quant.runtime.fp8 import MOVED, Fp8, widen
from quant.runtime.int8 import Int8, round_tokens
from quant.runtime.linears import Plain
from tests.quant.runtime.test_int4 import check_product


def test_every_e4m3_value_widens_to_the_formats_own_bf16_bit_for_bit():
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8).view(torch.int8)
    scale_N1 = torch.tensor([1.0, 0.0123, 3e-5, 117.0, 2.0**-126]).bfloat16()[:, None]
    codes_NK = codes.expand(5, -1)
    wanted_NK = fp8_format.Fp8().decompress({"weight": codes_NK.view(fp8_format.E4M3), "weight_scale": scale_N1})
    assert torch.equal(widen(codes_NK, scale_N1 * MOVED), wanted_NK)


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("rounds_inputs", [False, True])
def test_fp8_products_are_those_of_the_unpacked_weight(rows, rounds_inputs):
    weight_NK = torch.randn(200, 96) * 0.05
    tensors = fp8_format.Fp8().compress(weight_NK, Ranges())
    layer = Fp8.pack([tensors], rounds_inputs=rounds_inputs)
    input_MK = torch.randn(rows, 96).bfloat16()
    seen_MK = fp8_format.fake_quantise_tokens(input_MK) if rounds_inputs else input_MK
    check_product(layer.product(input_MK), seen_MK, fp8_format.Fp8().decompress(tensors))
    assert layer.packed_bytes == 200 * 96 + 200 * 2


def test_one_scale_for_a_tensor_counts_for_all_its_rows():
    tensors = {"weight": torch.randn(32, 64).to(fp8_format.E4M3), "weight_scale": torch.tensor([0.5]).bfloat16()}
    layer = Fp8.pack([tensors, tensors], rounds_inputs=False)
    found_KN = layer.product(torch.eye(64, dtype=torch.bfloat16))
    assert torch.equal(found_KN.T, torch.cat([tensors["weight"].bfloat16() * 0.5] * 2))


def test_int8_inputs_are_rounded_as_the_format_rounds_them():
    input_MK = torch.cat([torch.randn(20, 64) * 10.0 ** torch.arange(-4, 1).repeat(4)[:, None], torch.zeros(1, 64)])
    codes_MK, scale_M1 = round_tokens(input_MK.bfloat16())
    assert torch.equal(codes_MK * scale_M1, int8_format.fake_quantise_tokens(input_MK.bfloat16()))


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("kernel_rows", [0, 1000])
def test_w8a8_is_the_integer_product_to_within_bf16(rows, kernel_rows):
    tensors = int8_format.Int8().compress(torch.randn(48, 96) * 0.05, Ranges())
    layer = Int8.pack([tensors])
    layer.kernel_rows = kernel_rows
    input_MK = torch.randn(rows, 96).bfloat16()
    codes_MK, scale_M1 = round_tokens(input_MK)
    # The first way sees inputs scaled back in bf16, as the format computes; the second the integers themselves.
    seen_MK = (codes_MK * scale_M1).double() if kernel_rows else codes_MK.double() * scale_M1.double()
    exact_NK = tensors["weight"].double() * tensors["weight_scale"].double()
    check_product(layer.product(input_MK), seen_MK, exact_NK)
    assert layer.packed_bytes == 48 * 96 + 48 * 2


@pytest.mark.parametrize("fixed", [1000, None])
def test_a_width_that_the_kernel_reads_beyond_goes_through_integers(fixed):
    tensors = int8_format.Int8().compress(torch.randn(24, 72) * 0.05, Ranges())
    layer = Int8.pack([tensors])
    Crossovers(fixed).set(layer)
    assert layer.kernel_rows == 0
    input_MK = torch.randn(3, 72).bfloat16()
    codes_MK, scale_M1 = round_tokens(input_MK)
    exact_NK = tensors["weight"].double() * tensors["weight_scale"].double()
    check_product(layer.product(input_MK), codes_MK.double() * scale_M1.double(), exact_NK)


def test_a_bias_and_leading_dimensions_are_those_of_a_linear_layer():
    layer = Plain(torch.randn(7, 4).bfloat16())
    layer.bias = torch.randn(7).bfloat16()
    input = torch.randn(2, 3, 4).bfloat16()
    wanted = torch.nn.functional.linear(input.double(), layer.weight.double(), layer.bias.double())
    torch.testing.assert_close(layer(input).double(), wanted, rtol=2**-7, atol=2**-7)
