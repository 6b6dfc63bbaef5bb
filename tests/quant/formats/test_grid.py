"""Grids: parameters against plain recipes and a full search, codes and values against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.formats.grid import Grid, Parameters
from quant.formats.grid_search import Rounding

GRIDS = [Grid(bits, symmetric, size) for bits in (4, 8) for symmetric in (True, False) for size in (32, 128, None)]
NORMAL, HEAVY, SHIFTED = "normal", "heavy-tailed", "shifted"


def random_weight(seed: int, *, rows: int = 32, columns: int = 256, kind: str = NORMAL) -> torch.Tensor:
    torch.manual_seed(seed)
    shape = (rows, columns)
    weight = torch.distributions.StudentT(3.0).sample(shape) if kind == HEAVY else torch.randn(shape)
    return (0.02 * (weight + (1.5 if kind == SHIFTED else 0.0))).bfloat16()


def exact(codes_NK: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    """scale * (code - zero) in float64."""
    groups = parameters.scale_NG.shape[-1]
    zero = 0 if parameters.zero_NG is None else parameters.zero_NG.double()[..., None]
    codes_NGS = codes_NK.double().unflatten(-1, (groups, -1))
    return ((codes_NGS - zero) * parameters.scale_NG.double()[..., None]).flatten(-2)


def squared_error(weight_NK: torch.Tensor, grid: Grid, parameters: Parameters) -> torch.Tensor:
    """In float64, per group [N, G], rounded by float64's own arithmetic."""
    groups = parameters.scale_NG.shape[-1]
    weight_NGS = weight_NK.double().unflatten(-1, (groups, -1))
    scale = parameters.scale_NG.double()[..., None]
    zero = 0 if parameters.zero_NG is None else parameters.zero_NG.double()[..., None]
    codes = (weight_NGS / scale + zero).round().clamp(grid.lowest, grid.highest)
    return ((codes - zero) * scale - weight_NGS).square().sum(-1)


def plain(weight_NK: torch.Tensor, grid: Grid) -> Parameters:
    """compressed-tensors' own recipe: absmax over half the range, or the range from least to largest."""
    weight_NGS = weight_NK.float().unflatten(-1, (grid.groups(weight_NK.shape[-1]), -1))
    if grid.symmetric:
        return Parameters((weight_NGS.abs().amax(-1) / (2 ** (grid.bits - 1) - 0.5)).bfloat16().float())
    low, high = weight_NGS.amin(-1).clamp(max=0), weight_NGS.amax(-1).clamp(min=0)
    scale = ((high - low) / (2**grid.bits - 1)).bfloat16().float()
    return Parameters(scale, (grid.lowest - low / scale).round().clamp(grid.lowest, grid.highest).to(torch.int8))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", [NORMAL, HEAVY, SHIFTED])
def test_no_group_has_a_larger_squared_error_than_with_the_plain_recipe(grid: Grid, kind: str):
    weight_NK = random_weight(0, kind=kind)
    ours_NG = squared_error(weight_NK, grid, grid.search(weight_NK))
    theirs_NG = squared_error(weight_NK, grid, plain(weight_NK, grid))
    assert torch.all(ours_NG <= theirs_NG * (1 + 1e-5))
    assert grid.bits == 8 or ours_NG.sum() < 0.97 * theirs_NG.sum()


def test_asymmetric_grids_fit_shifted_weights_better():
    weight_NK = random_weight(1, kind=SHIFTED)
    symmetric, asymmetric = (Grid(4, kind, 64) for kind in (True, False))
    errors = [squared_error(weight_NK, grid, grid.search(weight_NK)).sum() for grid in (symmetric, asymmetric)]
    assert errors[1] < 0.6 * errors[0]


def test_negative_scales_run_in_torchs_int4_kernel():
    grid = Grid(4, True, 32)
    weight_NK = random_weight(2, rows=64)
    parameters = grid.search(weight_NK)
    codes_NK = grid.encode(weight_NK, parameters)
    assert (parameters.scale_NG < 0).float().mean() > 0.3
    input_MK = torch.randn(3, 256).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK.int() + 8, 1)
    scale_GN = parameters.scale_NG.T.bfloat16()
    scales_GN2 = torch.stack([scale_GN, torch.zeros_like(scale_GN)], -1).contiguous()
    ran = torch.ops.aten._weight_int4pack_mm_for_cpu(input_MK, packed, 32, scales_GN2)
    wanted = input_MK.double() @ grid.decode(codes_NK, parameters).double().T
    assert (ran.double() - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_are_the_nearest_and_values_the_exact_product_rounded_once(grid: Grid):
    weight_NK = random_weight(3)
    parameters = grid.search(weight_NK)
    codes_NK = grid.encode(weight_NK, parameters)
    assert codes_NK.dtype == torch.int8 and codes_NK.min() >= grid.lowest and codes_NK.max() <= grid.highest
    value_NK = exact(codes_NK, parameters)
    for step in (-1, 1):
        other_NK = (codes_NK.short() + step).clamp(grid.lowest, grid.highest)
        nearer = (exact(other_NK, parameters) - weight_NK).abs() < (value_NK - weight_NK).abs() - 1e-9
        assert not nearer.any()
    assert torch.equal(grid.decode(codes_NK, parameters), value_NK.bfloat16())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_are_bf16_and_zeros_are_codes(grid: Grid):
    parameters = grid.search(random_weight(4, kind=SHIFTED))
    assert parameters.scale_NG.dtype == torch.float32
    assert torch.equal(parameters.scale_NG, parameters.scale_NG.bfloat16().float())
    assert (parameters.zero_NG is None) == grid.symmetric
    if parameters.zero_NG is not None:
        assert parameters.zero_NG.dtype == torch.int8 and parameters.zero_NG.min() >= grid.lowest


@pytest.mark.parametrize("grid", GRIDS[::2], ids=str)
def test_experts_are_searched_encoded_and_decoded_as_one_by_one(grid: Grid):
    weight_ENK = torch.stack([random_weight(seed) for seed in (5, 6, 7)])
    importance_EK = torch.rand(3, weight_ENK.shape[-1]) + 0.1
    parameters = grid.search(weight_ENK, importance_EK)
    codes_ENK = grid.encode(weight_ENK, parameters)
    for expert in range(3):
        alone = grid.search(weight_ENK[expert], importance_EK[expert])
        assert torch.equal(parameters.scale_NG[expert], alone.scale_NG)
        assert torch.equal(codes_ENK[expert], grid.encode(weight_ENK[expert], alone))
        assert torch.equal(grid.decode(codes_ENK, parameters)[expert], grid.decode(codes_ENK[expert], alone))


def test_a_single_column_is_encoded_as_within_its_group():
    grid = Grid(4, False, 64)
    weight_NK = random_weight(8)
    parameters = grid.search(weight_NK)
    codes_NK = grid.encode(weight_NK, parameters)
    for column in (0, 70, 255):
        group = slice(column // 64, column // 64 + 1)
        at = Parameters(parameters.scale_NG[:, group], parameters.zero_NG[:, group])
        assert torch.equal(grid.encode(weight_NK[:, column : column + 1], at), codes_NK[:, column : column + 1])


@pytest.mark.parametrize("symmetric", [True, False])
def test_errors_where_it_matters_shrink_with_importance(symmetric: bool):
    grid = Grid(4, symmetric, 64)
    weight_NK = random_weight(9, rows=256)
    importance_K = torch.where(torch.arange(256) % 8 == 0, 30.0, 0.1)

    def harm(parameters: Parameters) -> torch.Tensor:
        error_NK = (grid.decode(grid.encode(weight_NK, parameters), parameters).double() - weight_NK.double()).abs()
        return (error_NK.square() * importance_K).sum()

    assert harm(grid.search(weight_NK, importance_K)) < 0.8 * harm(grid.search(weight_NK))


@pytest.mark.parametrize("kind", [NORMAL, HEAVY])
def test_the_search_comes_within_three_percent_of_trying_every_bf16_scale(kind: str):
    weight_MS = random_weight(10, rows=256, columns=64, kind=kind).float()
    weight_MS = weight_MS / weight_MS.abs().amax()  # fourth powers stay normal numbers
    rounding = Rounding(weight_MS, None, 4)
    found_M = rounding.errors(Grid(4, True, None).search(weight_MS).scale_NG[:, 0])[1].double()
    full_M = weight_MS.abs().amax(-1) / 7.5
    limit_M = torch.minimum(*(rounding.errors((full_M * p).bfloat16().float())[0] for p in (1.0, 0.9375)))
    least_M = torch.full_like(found_M, torch.inf)
    highest = (1.2 * full_M).bfloat16().view(torch.int16)
    for below in range(130):  # one bf16 value after another, down to half of absmax / 7.5
        for sign in (1, -1):
            square_M, fourth_M = rounding.errors(sign * (highest - below).view(torch.bfloat16).float())
            least_M = torch.where(square_M <= limit_M, torch.minimum(least_M, fourth_M.double()), least_M)
    assert found_M.sum() <= 1.03 * least_M.sum()


@given(scale=st.floats(-(2.0**100), 2.0**100, width=32))
def test_scales_for_gguf_are_exact_in_fp16_and_in_bf16(scale: float):
    stored = Grid(4, True, 32, half=True).storable(torch.tensor(scale))
    assert stored != 0 and torch.isfinite(stored)
    assert stored == stored.half().float() == stored.bfloat16().float()
    if 2.0**-14 <= abs(scale) <= 60000:
        assert stored == torch.tensor(scale).bfloat16().float()


@given(value=st.sampled_from([0.0, 1e-39, 1e-30, 1e30, 3e38]), grid=st.sampled_from(GRIDS))
def test_groups_of_zeros_and_of_extreme_values_stay_finite(value: float, grid: Grid):
    weight_NK = torch.zeros(2, 128)
    weight_NK[0, 5] = value
    parameters = grid.search(weight_NK)
    restored_NK = exact(grid.encode(weight_NK, parameters), parameters)
    assert torch.isfinite(parameters.scale_NG).all()
    assert (restored_NK - weight_NK).abs().max() <= max(value * 0.01, 1e-38)
