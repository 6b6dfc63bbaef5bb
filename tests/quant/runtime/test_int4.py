"""Int4 for serving: stored words to torch's kernel and back, exactly; products against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quant.formats.grid import Grid, Parameters
from quant.formats.packed import PackedIntegers
from quant.runtime.int4 import Int4, find_block
from quant.runtime.stored_layers import Kind, Kinds, StoredLayers

BLOCK = find_block()


def stored(rows: int, columns: int, group_size: int | None, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors of random codes, the lowest and highest among them, with scales of both signs; and what
    they stand for, in float64, unrounded."""
    generator = torch.Generator().manual_seed(seed)
    packed = PackedIntegers(Grid(bits=4, symmetric=True, group_size=group_size))
    codes_NK = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=generator)
    codes_NK[0, :2] = torch.tensor([-8, 7])
    groups = packed.grid.groups(columns)
    scale_NG = (torch.randn(rows, groups, generator=generator) * 0.02).bfloat16().float()
    exact_NK = (codes_NK.double().view(rows, groups, -1) * scale_NG.double()[..., None]).view(rows, columns)
    return packed.store(codes_NK, Parameters(scale_NG)), exact_NK


def check_product(found_MN: Tensor, input_MK: Tensor, weight_NK: Tensor) -> None:
    """Within bf16's rounding of the result and fp32's of the sum."""
    wanted_MN = input_MK.double() @ weight_NK.double().T
    terms_MN = input_MK.double().abs() @ weight_NK.double().abs().T
    bound_MN = wanted_MN.abs() * 2.0**-8 + terms_MN * input_MK.shape[1] * 2.0**-24
    assert ((found_MN.double() - wanted_MN).abs() <= bound_MN).all()


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, None])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_both_ways_are_the_stored_values_to_within_bf16(group_size, rows):
    tensors, exact_NK = stored(128, 512, group_size)
    layer = Int4.pack([tensors], BLOCK)
    input_MK = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    check_product(layer.through_kernel(input_MK), input_MK, exact_NK)
    check_product(layer.through_tiles(input_MK), input_MK, exact_NK.bfloat16())


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 2**31))
def test_any_shape_the_kernel_holds_is_exact(sixteens, groups, seed):
    tensors, exact_NK = stored(16 * sixteens, 32 * groups, 32, seed)
    layer = Int4.pack([tensors], BLOCK)
    # The rows of an identity read single weights, whose code x scale bf16 rounds once.
    found_KN = layer.through_kernel(torch.eye(32 * groups, dtype=torch.bfloat16))
    assert torch.equal(found_KN.T, exact_NK.bfloat16())
    assert torch.equal(layer.product(torch.eye(32 * groups, dtype=torch.bfloat16)).T, exact_NK.bfloat16())


def test_unpacked_tiles_are_the_formats_own_values_bit_for_bit():
    tensors, _ = stored(192, 96, 32)
    layer = Int4.pack([tensors], BLOCK)
    first, second = layer.unpack(slice(None))
    halves = [half_KN.T.reshape(-1, BLOCK // 2, 96) for half_KN in (first, second)]
    wanted_NK = PackedIntegers(Grid(4, True, 32)).decompress(tensors)
    assert torch.equal(torch.cat(halves, 1).reshape(192, 96), wanted_NK)


def test_fused_layers_are_the_layers_one_above_the_other():
    parts = [stored(48, 64, 32, seed) for seed in (1, 2)]
    layer = Int4.pack([tensors for tensors, _ in parts], BLOCK)
    found_KN = layer.product(torch.eye(64, dtype=torch.bfloat16))
    assert torch.equal(found_KN.T, torch.cat([exact_NK for _, exact_NK in parts]).bfloat16())


@pytest.mark.parametrize("rows, columns, group_size", [(24, 64, 32), (16, 48, None), (8, 32, 32)])
def test_a_shape_the_kernel_cannot_hold_is_unpacked_to_the_same_values(rows, columns, group_size):
    tensors, exact_NK = stored(rows, columns, group_size)
    assert Int4.pack([tensors], BLOCK) is None
    kinds = Kinds([(["Linear"], Kind("int4", "weight_packed", tuple(tensors), False, group_size))])
    layers = StoredLayers({f"layer.{suffix}": tensor for suffix, tensor in tensors.items()}, kinds, Untimed())
    assert torch.equal(layers.make(["layer"]).weight, exact_NK.bfloat16())


class Untimed:
    """Crossovers that are not needed."""

    def set(self, layer: object) -> None:
        pass


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_four_bits_stay_four_bits(group_size):
    tensors, _ = stored(256, 512, group_size)
    layer = Int4.pack([tensors], BLOCK)
    assert layer.packed_bytes == 256 * 512 // 2 + 256 * (512 // group_size) * 4  # the kernel pairs scales with zeros


def test_a_layer_without_a_known_interleaving_uses_the_kernel_for_any_number_of_rows():
    tensors, exact_NK = stored(64, 64, 32)
    layer = Int4.pack([tensors], None)
    input_MK = torch.randn(200, 64).bfloat16()
    check_product(layer.product(input_MK), input_MK, exact_NK)
