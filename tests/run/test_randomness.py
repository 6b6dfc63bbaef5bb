"""Random streams: seeded, told apart by rank, saved as plain values and continued exactly."""

import random

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.run.randomness import restore_rng, rng_state, seed_everything


def draws() -> list[float]:
    # An odd number of gauss() and randn() leaves a spare value in the generators' state.
    return [
        random.random(), random.gauss(0, 1), float(numpy.random.rand()), float(numpy.random.randn()),
        *torch.rand(3).tolist(), *torch.randn(17).tolist(),
    ]  # fmt: skip


@given(seed=st.integers(0, 2**31), before=st.integers(0, 3))
def test_a_saved_state_continues_exactly(seed: int, before: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "rng.pt"
    seed_everything(seed)
    for _ in range(before):
        draws()
    torch.save(rng_state(), path)
    expected = draws() + draws()
    seed_everything(seed + 1)
    restore_rng(torch.load(path, weights_only=True))
    assert draws() + draws() == expected


def test_the_same_seed_gives_the_same_numbers_and_every_rank_its_own() -> None:
    seen = {}
    for seed in range(3):
        for rank in range(4):
            seed_everything(seed, rank=rank)
            seen[seed, rank] = tuple(draws())
    assert len(set(seen.values())) == 12
    seed_everything(2, rank=3)
    assert tuple(draws()) == seen[2, 3]


def test_rank_0_has_the_seed_itself() -> None:
    seed_everything(7)
    mine = torch.rand(2)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(2), mine)
