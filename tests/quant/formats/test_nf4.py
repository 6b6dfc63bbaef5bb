"""NF4 against bitsandbytes: the same bytes from its quantiser, the same values from its dequantiser."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.formats.format import Ranges
from quant.formats.nf4 import LEVELS, STATE, Nf4, dynamic_map, quantise_scales

SHAPES = st.tuples(st.integers(1, 40), st.sampled_from([64, 128, 192, 448]))


def random_weight(seed: int, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)).bfloat16()


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@given(seed=st.integers(0, 10_000), shape=SHAPES, double=st.booleans())
def test_every_stored_byte_is_bitsandbytes_own(seed: int, shape: tuple[int, int], double: bool):
    weight_NK = random_weight(seed, shape)
    tensors = Nf4(double).compress(weight_NK, Ranges())
    packed, state = bnb.quantize_4bit(weight_NK, quant_type="nf4", compress_statistics=double)
    theirs = {"weight": packed} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    assert tensors.keys() == theirs.keys()
    for name in tensors.keys() - {STATE} - ({"weight.absmax"} if double else set()):
        assert tensors[name].dtype == theirs[name].dtype and tensors[name].shape == theirs[name].shape, name
        assert torch.equal(raw(tensors[name]), raw(theirs[name])), name
    ours, other = (bytes(group[STATE].tolist()) for group in (tensors, theirs))
    assert ours.rstrip() == other.rstrip() if not double else json.loads(ours) == json.loads(other)


@given(seed=st.integers(0, 10_000), shape=SHAPES, double=st.booleans())
def test_values_are_those_bitsandbytes_reads_from_our_tensors(seed: int, shape: tuple[int, int], double: bool):
    tensors = Nf4(double).compress(random_weight(seed, shape), Ranges())
    stats = {name.removeprefix("weight."): tensor.clone() for name, tensor in tensors.items() if name != "weight"}
    state = bnb.QuantState.from_dict(stats, torch.device("cpu"))
    assert torch.equal(Nf4(double).decompress(tensors), bnb.dequantize_4bit(tensors["weight"], state))


@pytest.mark.parametrize("double", [False, True])
def test_headers_are_known_before_the_weights_are(double: bool):
    for shape in ((3, 64), (128, 256), (40, 448)):
        for seed in range(3):
            tensors = Nf4(double).compress(random_weight(seed, shape), Ranges())
            found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            assert found == Nf4(double).stored(shape)


def test_codes_are_the_nearest_levels_in_float64_and_the_first_of_a_pair_is_the_high_half():
    weight_NK = random_weight(1, (64, 128))
    tensors = Nf4().compress(weight_NK, Ranges())
    share = weight_NK.double().view(-1, 64) / weight_NK.double().view(-1, 64).abs().amax(-1, keepdim=True)
    packed = tensors["weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], -1).view(-1, 64)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    nearest = (share[..., None] - levels).abs().amin(-1)
    assert ((share - levels[codes.long()]).abs() - nearest).abs().max() < 1e-7  # fp32 may decide a tie otherwise


def test_a_matrix_of_zeros_stays_zero():
    for double in (False, True):
        restored = Nf4(double).decompress(Nf4(double).compress(torch.zeros(4, 64).bfloat16(), Ranges()))
        assert torch.equal(restored, torch.zeros(4, 64).bfloat16())


def test_the_dynamic_type_has_the_levels_of_bitsandbytes():
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@given(seed=st.integers(0, 10_000), blocks=st.integers(1, 700))
def test_scales_are_quantised_as_in_bitsandbytes(seed: int, blocks: int):
    scale_B = torch.randn(blocks, generator=torch.Generator().manual_seed(seed))
    codes_B, absmax_C = quantise_scales(scale_B)
    theirs, state = bnb.quantize_blockwise(scale_B, blocksize=256)
    assert torch.equal(absmax_C, state.absmax)
    share_B = scale_B.double() / absmax_C.repeat_interleave(256)[:blocks].double()
    ours, other = ((dynamic_map().double()[codes.long()] - share_B).abs() for codes in (codes_B, theirs))
    assert torch.all(ours <= other + 1e-7)
    assert (codes_B != theirs).sum() <= 2 + 0.01 * blocks
    assert torch.all((codes_B == theirs) | (other - ours < 1e-4))  # bitsandbytes errs close to a tie only
