"""Every compressed-tensors format, bit by bit: the library's own compressors pack and read the same tensors."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from hypothesis import given
from hypothesis import strategies as st

from quant.allocations import Allocation
from quant.formats import fp4
from quant.formats.format import Ranges
from quant.formats.fp8 import encode, scale_for
from quant.formats.mxfp4 import usual_exponent
from quant.readers import COMPRESSED, SCHEMES
from quant.schemes import Scheme
from quant.sections import format_name, section

ALL = [
    Scheme.named(name, size, COMPRESSED)
    for name, kind in SCHEMES.items()
    if COMPRESSED in kind.containers
    for size in ((32, 128, "channel") if kind.grouped else (64,))
]
RANGES = Ranges(weight_absmax=0.3, input_absmax=5.0)
GRIDS = [scheme for scheme in ALL if scheme.grid is not None]


def random_weight(seed: int, *, rows: int = 128, columns: int = 256) -> torch.Tensor:
    weight_NK = 0.02 * torch.distributions.StudentT(4.0).sample((rows, columns))
    torch.manual_seed(seed)
    return (0.02 * torch.randn(rows, columns) + 0.1 * weight_NK).clamp(-0.3, 0.3).bfloat16()


def library(scheme: Scheme) -> tuple[type[BaseCompressor], QuantizationScheme]:
    """The library's compressor and its own reading of our config.json."""
    group = section(Allocation.uniform(scheme), [])["config_groups"]["group_0"]
    return BaseCompressor.get_value_from_registry(format_name(scheme)), QuantizationScheme.model_validate(group)


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.label)
def test_headers_are_those_of_the_tensors_that_are_made(scheme: Scheme):
    tensors = scheme.compress(random_weight(0), RANGES)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == scheme.stored((128, 256))
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.label)
def test_the_library_reads_the_values_we_say_it_reads(scheme: Scheme):
    tensors = scheme.compress(random_weight(1), RANGES)
    compressor, theirs = library(scheme)
    value = compressor.decompress(dict(tensors), theirs)["weight"]
    assert value.dtype == torch.bfloat16
    assert torch.equal(value, scheme.decompress(tensors))


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.label)
def test_the_library_packs_our_values_into_our_bits(scheme: Scheme):
    tensors = scheme.compress(random_weight(2), RANGES)
    compressor, theirs = library(scheme)
    facts = {name: tensors[name] for name in ("weight_global_scale", "input_scale") if name in tensors}
    scale = tensors["weight_scale"].float()
    if scheme.name == "mxfp4":
        scale = torch.ldexp(torch.ones_like(scale), tensors["weight_scale"].int() - 127)
    if not getattr(scheme.grid, "symmetric", True):
        facts["weight_zero_point"] = scheme.format.unpack(tensors)[1].zero_NG
    given_ = {"weight": scheme.decompress(tensors).float(), "weight_scale": scale} | facts
    packed = compressor.compress(given_, theirs)
    for name in tensors.keys() - {"weight_scale"}:
        ours, other = tensors[name], packed[name]
        if name == "weight_packed" and "fp4" in scheme.name:  # they keep the sign of a zero
            ours, other = fp4.decode(fp4.unpack(ours)), fp4.decode(fp4.unpack(other))
        assert torch.equal(ours.float(), other.float()), name
    if "fp4" in scheme.name:
        assert torch.equal(packed["weight_scale"].float(), tensors["weight_scale"].float())


@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.label)
def test_values_are_within_half_a_step_in_float64(scheme: Scheme):
    weight_NK = random_weight(3)
    error = (scheme.decompress(scheme.compress(weight_NK, RANGES)).double() - weight_NK.double()).norm()
    bound = {"fp8": 0.03, "fp8-static": 0.03, "fp8-block": 0.03, "int8": 0.012, "int8-weights": 0.012}
    assert error <= bound.get(scheme.name, 0.2 if scheme.group_size == "channel" else 0.13) * weight_NK.double().norm()


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 20), words=st.integers(1, 9), scheme=st.sampled_from(GRIDS))
def test_packed_integers_are_the_format_bit_by_bit(seed: int, rows: int, words: int, scheme: Scheme):
    if scheme.name == "int8" or scheme.group_size not in (32, "channel"):
        return
    bits, columns = scheme.grid.bits, 32 * words
    codes_NK = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns)).to(torch.int8)
    parameters = scheme.grid.search(codes_NK.float())
    tensors = scheme.store(codes_NK, parameters)
    words_NW = tensors["weight_packed"].numpy().view(np.uint32).astype(np.uint64)
    elements = [
        (words_NW[:, i * bits // 32] >> np.uint64(i * bits % 32)) & np.uint64(2**bits - 1) for i in range(columns)
    ]
    assert np.array_equal(np.stack(elements, 1).astype(np.int64) - 2 ** (bits - 1), codes_NK.numpy())
    codes, again = scheme.format.unpack(tensors)
    assert torch.equal(codes, codes_NK) and torch.equal(again.scale_NG, parameters.scale_NG)
    if not scheme.grid.symmetric:
        assert torch.equal(again.zero_NG, parameters.zero_NG)
        zeros_WG = tensors["weight_zero_point"].numpy().view(np.uint32)
        first = (zeros_WG[0, 0] & 15).astype(np.int64) - 8
        assert first == parameters.zero_NG[0, 0].item()


def test_every_fp4_code_is_the_nearest_and_ties_go_to_the_even_mantissa():
    values = torch.linspace(-8, 8, 2049, dtype=torch.float64).float()
    codes = fp4.encode(values)
    grid = fp4.decode(torch.arange(16, dtype=torch.uint8)).double()
    distance = (values[:, None].double() - grid).abs()
    assert torch.equal((fp4.decode(codes).double() - values.double()).abs(), distance.amin(-1))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert fp4.decode(fp4.encode(ties)).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert fp4.decode(fp4.encode(-ties)).tolist() == [0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]


@given(seed=st.integers(0, 10_000))
def test_fp4_packing_is_undone_by_unpacking(seed: int):
    codes_NK = torch.randint(0, 16, (5, 64), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(fp4.unpack(fp4.pack(codes_NK)), codes_NK)
    assert fp4.pack(codes_NK)[0, 0] == codes_NK[0, 0] + 16 * codes_NK[0, 1]


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_no_fp4_group_has_a_larger_error_than_with_the_librarys_own_scale(name: str):
    scheme = Scheme.named(name)
    weight_NK = random_weight(4, rows=256).float()
    _, theirs = library(scheme)
    groups_NGS = weight_NK.unflatten(1, (-1, theirs.weights.group_size))
    tensors = scheme.compress(weight_NK, Ranges(weight_absmax=weight_NK.abs().max().item()))
    factor = tensors.get("weight_global_scale")
    scale_NG, _ = calculate_qparams(groups_NGS.amin(-1), groups_NGS.amax(-1), theirs.weights, factor)
    value_NK = fake_quantize(weight_NK, scale_NG.float(), None, theirs.weights, factor)
    errors = [
        (value.double() - weight_NK.double()).square().unflatten(1, groups_NGS.shape[1:]).sum(-1)
        for value in (scheme.decompress(tensors), value_NK)
    ]
    # One bf16 rounding of each value is in ours.
    assert torch.all(errors[0] <= errors[1] * 1.01 + 1e-12)
    assert errors[0].sum() < (0.97 if name == "nvfp4" else 1.0) * errors[1].sum()


@given(absmax=st.floats(2.0**-100, 2.0**100, width=32))
def test_the_usual_mxfp4_exponent_is_the_librarys(absmax: float):
    _, theirs = library(Scheme.named("mxfp4"))
    scale, _ = calculate_qparams(torch.tensor([-absmax]), torch.tensor([absmax / 2]), theirs.weights)
    assert scale.item() == 2.0 ** (usual_exponent(torch.tensor([absmax])).item() - 127)


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8-block"])
@given(seed=st.integers(0, 10_000), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_activations_round_as_in_the_library(name: str, seed: int, dtype: torch.dtype):
    _, theirs = library(Scheme.named(name))
    input_BTK = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(seed)).to(dtype)
    input_BTK[0, 0] = 0
    scale, zero = compute_dynamic_scales_and_zp(input_BTK, theirs.input_activations, torch.nn.Module())
    wanted = fake_quantize(input_BTK, scale, zero, theirs.input_activations)
    rounding = Scheme.named(name).format.input_rounding({})
    assert torch.equal(rounding(input_BTK), wanted)
    assert torch.equal(rounding(input_BTK[1]), wanted[1])


def test_static_activations_round_as_in_the_library():
    scheme = Scheme.named("fp8-static")
    _, theirs = library(scheme)
    tensors = scheme.compress(random_weight(5), RANGES)
    input_BTK = 2 * torch.randn(2, 3, 256).bfloat16()
    wanted = fake_quantize(input_BTK, tensors["input_scale"], None, theirs.input_activations)
    assert torch.equal(scheme.format.input_rounding(tensors)(input_BTK), wanted)
    assert tensors["input_scale"].item() == torch.tensor(5.0 / 448).bfloat16().item()


def test_block_scales_are_those_of_their_block_alone():
    scheme = Scheme.named("fp8-block")
    weight_NK = random_weight(6, rows=256)
    tensors = scheme.compress(weight_NK)
    for row in range(2):
        for column in range(2):
            block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            scale = scale_for(weight_NK[block].abs().max())
            assert tensors["weight_scale"][row, column] == scale
            assert torch.equal(tensors["weight"][block].float(), encode(weight_NK[block], scale).float())
