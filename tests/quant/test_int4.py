"""Int4: packing against an independent NumPy reading of the format, scales against plain recipes and a full search."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import int4
from quant.schemes import Scheme

NORMAL, HEAVY = "normal", "heavy-tailed"


def random_weight(seed: int, *, rows: int = 64, columns: int = 128, kind: str = NORMAL) -> torch.Tensor:
    torch.manual_seed(seed)
    shape = (rows, columns)
    weight = torch.randn(shape) if kind == NORMAL else torch.distributions.StudentT(3.0).sample(shape)
    return (0.02 * weight).bfloat16()


def numpy_unpack(words: np.ndarray, columns: int) -> np.ndarray:
    """The format as written down: element i in bits 4 (i % 8) .. + 3 of word i // 8, offset by 8."""
    bits = words.view(np.uint32).astype(np.uint64)
    elements = [(bits[:, i // 8] >> np.uint64(4 * (i % 8))) & np.uint64(15) for i in range(columns)]
    return np.stack(elements, axis=1).astype(np.int64) - 8


def squared_error(weight_NK: torch.Tensor, scale_NG: torch.Tensor) -> torch.Tensor:
    """In float64, per group [N, G]: clamp(round(w / s), -8, 7) * s against w."""
    groups = scale_NG.shape[1]
    weight_NGS = weight_NK.double().unflatten(1, (groups, -1))
    scale = scale_NG.double()[..., None]
    return ((weight_NGS / scale).round().clamp(-8, 7) * scale - weight_NGS).square().sum(-1)


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 9), words=st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_packing_is_the_format_bit_by_bit(seed: int, rows: int, words: int):
    codes_NK = torch.randint(-8, 8, (rows, 8 * words), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = int4.pack(codes_NK)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, words)
    assert np.array_equal(numpy_unpack(packed.numpy(), 8 * words), codes_NK.numpy())
    assert torch.equal(int4.unpack(packed, 8 * words), codes_NK)


def test_the_first_word_holds_the_first_eight_codes_lowest_bits_first():
    codes_NK = torch.tensor([[-8, 7, 0, 1, -1, 2, -2, 3]], dtype=torch.int8)
    assert int4.pack(codes_NK).item() & 0xFFFFFFFF == 0xB6A798F0


@pytest.mark.parametrize("group_size", int4.GROUP_SIZES)
@pytest.mark.parametrize("kind", [NORMAL, HEAVY])
def test_no_group_has_a_larger_squared_error_than_with_absmax_over_7_5_or_8(group_size: int, kind: str):
    weight_NK = random_weight(0, rows=512, kind=kind)
    codes_NK, scale_NG = int4.quantise(weight_NK, group_size)
    absmax_NG = weight_NK.float().unflatten(1, (-1, group_size)).abs().amax(-1)
    ours = (int4.dequantise(codes_NK, scale_NG.float()).double() - weight_NK.double()).square()
    ours_NG = ours.unflatten(1, (-1, group_size)).sum(-1)
    for divisor in (7.5, 8.0):
        theirs_NG = squared_error(weight_NK, (absmax_NG / divisor).bfloat16())
        assert torch.all(ours_NG <= theirs_NG * (1 + 1e-5))
        assert ours_NG.sum() < 0.9 * theirs_NG.sum()


@pytest.mark.parametrize("kind", [NORMAL, HEAVY])
def test_the_search_comes_within_three_percent_of_trying_every_bf16_scale(kind: str):
    weight_MS = random_weight(1, rows=256, columns=64, kind=kind).float()
    weight_MS = weight_MS / weight_MS.abs().amax()  # fourth powers stay normal numbers
    found_M = int4.errors(weight_MS, int4.search_scale(weight_MS))[1].double()
    full_M = weight_MS.abs().amax(-1) / 7.5
    limit_M = torch.minimum(*(int4.errors(weight_MS, (full_M * p).bfloat16().float())[0] for p in (1.0, 0.9375)))
    least_M = torch.full_like(found_M, torch.inf)
    highest = (1.2 * full_M).bfloat16().view(torch.int16)
    for below in range(130):  # one bf16 value after another, down to half of absmax / 7.5
        for sign in (1, -1):
            square_M, fourth_M = int4.errors(weight_MS, sign * (highest - below).view(torch.bfloat16).float())
            least_M = torch.where(square_M <= limit_M, torch.minimum(least_M, fourth_M.double()), least_M)
    assert found_M.sum() <= 1.03 * least_M.sum()


def test_scales_are_bf16_and_codes_are_the_nearest():
    weight_NK = random_weight(2)
    codes_NK, scale_NG = int4.quantise(weight_NK, 32)
    assert scale_NG.dtype == torch.bfloat16
    exact = weight_NK.double().unflatten(1, (-1, 32)) / scale_NG.double()[..., None]
    assert (codes_NK.unflatten(1, (-1, 32)) - exact.clamp(-8, 7)).abs().max() <= 0.5 + 1e-6


def test_dequantised_values_are_the_exact_product_rounded_once_and_what_compressed_tensors_reads():
    weight_NK = random_weight(3)
    scheme = Scheme.named("int4", 64)
    stored = scheme.compress(weight_NK)
    codes_NK = torch.from_numpy(numpy_unpack(stored["weight_packed"].numpy(), 128))
    exact = (codes_NK.double().unflatten(1, (-1, 64)) * stored["weight_scale"].double()[..., None]).flatten(1)
    assert torch.equal(scheme.decompress(stored), exact.bfloat16())
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
    theirs = PackedQuantizationCompressor.decompress(stored, QuantizationScheme(targets=["Linear"], weights=args))
    assert torch.equal(theirs["weight"], exact.bfloat16())


def test_negative_scales_run_in_torchs_int4_kernel():
    weight_NK = random_weight(4, rows=64, columns=128)
    codes_NK, scale_NG = int4.quantise(weight_NK, 32)
    assert (scale_NG < 0).float().mean() > 0.3
    input_MK = torch.randn(3, 128).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK.int() + 8, 1)
    scales_GN2 = torch.stack([scale_NG.T, torch.zeros_like(scale_NG.T)], -1).contiguous()
    ran = torch.ops.aten._weight_int4pack_mm_for_cpu(input_MK, packed, 32, scales_GN2)
    exact = input_MK.double() @ int4.dequantise(codes_NK, scale_NG).double().T
    assert (ran.double() - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("value", [0.0, 1e-39, 3e38])
def test_groups_of_zeros_and_of_extreme_values_stay_finite(value: float):
    weight_NK = torch.zeros(2, 64)
    weight_NK[0, 5] = value
    codes_NK, scale_NG = int4.quantise(weight_NK, 32)
    restored = int4.dequantise(codes_NK, scale_NG.float())
    assert torch.isfinite(scale_NG).all()
    assert torch.isfinite(restored).all()
    assert (restored - weight_NK).abs().max() <= max(value * 0.01, 1e-38)
