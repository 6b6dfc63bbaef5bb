"""FP8: codes and scales against an enumeration of E4M3, activations against compressed-tensors' own arithmetic."""

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.formats import fp8
from quant.formats.format import Ranges

TOKEN = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="token", dynamic=True)
# Every finite E4M3 value: sign, 4 bits of exponent with bias 7, 3 of mantissa; 0x7F and 0xFF are NaN.
GRID = torch.tensor(
    [
        sign * ((mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
        for sign in (1, -1)
        for exponent in range(16)
        for mantissa in range(8)
        if (exponent, mantissa) != (15, 7)
    ],
    dtype=torch.float64,
).unique()


def quantise(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(fp8.Fp8().compress(weight_NK, Ranges()).values())


def random_weight(seed: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(5, 48, generator=generator) * torch.exp(spread * torch.randn(5, 48, generator=generator))
    ).bfloat16()


@given(seed=st.integers(0, 10_000), spread=st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_codes_are_torchs_own_cast_of_the_scaled_weight(seed: int, spread: float):
    weight_NK = random_weight(seed, spread)
    codes_NK, scale_N1 = quantise(weight_NK)
    largest = (weight_NK.float() / scale_N1.float()).clamp(-448, 448)
    assert torch.equal(codes_NK.view(torch.uint8), largest.to(torch.float8_e4m3fn).view(torch.uint8))


@given(seed=st.integers(0, 10_000), spread=st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_every_code_is_the_nearest_e4m3_value(seed: int, spread: float):
    weight_NK = random_weight(seed, spread)
    codes_NK, scale_N1 = quantise(weight_NK)
    exact_NK = weight_NK.double() / scale_N1.double()
    nearest_NK = (exact_NK[..., None] - GRID).abs().amin(-1)
    # fp32 division may move a value across a tie: half a step, up to one part in 2^23
    assert torch.all((codes_NK.double() - exact_NK).abs() <= nearest_NK + exact_NK.abs() * 2.0**-23)


def test_the_scale_is_absmax_over_448_rounded_to_bf16():
    weight_NK = random_weight(1, 1.0)
    _, scale_N1 = quantise(weight_NK)
    assert torch.equal(scale_N1, (weight_NK.double().abs().amax(-1, keepdim=True) / 448).float().bfloat16())


def test_a_channel_of_zeros_stays_zero():
    codes_NK, scale_N1 = quantise(torch.zeros(2, 32, dtype=torch.bfloat16))
    assert torch.equal(
        fp8.Fp8().decompress({"weight": codes_NK, "weight_scale": scale_N1}), torch.zeros(2, 32, dtype=torch.bfloat16)
    )


@given(seed=st.integers(0, 10_000), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
@settings(max_examples=20, deadline=None)
def test_activations_round_as_in_compressed_tensors(seed: int, dtype: torch.dtype):
    input_BTK = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    input_BTK[0, 0] = 0
    scale, zero = compute_dynamic_scales_and_zp(input_BTK, TOKEN, torch.nn.Module())
    assert torch.equal(fp8.fake_quantise_tokens(input_BTK), fake_quantize(input_BTK, scale, zero, TOKEN))


def test_a_tokens_activations_do_not_depend_on_its_neighbours():
    input_TK = torch.randn(4, 64) * torch.tensor([[1.0], [100.0], [0.01], [5.0]])
    alone = torch.cat([fp8.fake_quantise_tokens(row_K[None]) for row_K in input_TK])
    assert torch.equal(fp8.fake_quantise_tokens(input_TK), alone)
