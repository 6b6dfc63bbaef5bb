"""Orders are bijections, differ between keys, and look random."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from herd.data.permutation import shuffled


@given(st.integers(1, 5000), st.integers(0, 2**62), st.integers(0, 1000))
def test_every_item_comes_exactly_once(count: int, seed: int, epoch: int):
    items = shuffled(np.arange(count), count=count, key=(seed, epoch))
    assert np.array_equal(np.sort(items), np.arange(count))


@given(st.integers(1, 10**12), st.data())
def test_an_item_does_not_depend_on_what_else_is_asked(count: int, data):
    positions = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20, unique=True)))
    together = shuffled(positions, count=count, key=(1, 2))
    alone = [int(shuffled(positions[n : n + 1], count=count, key=(1, 2))[0]) for n in range(len(positions))]
    assert together.tolist() == alone
    assert len(set(alone)) == len(alone)
    assert min(alone) >= 0
    assert max(alone) < count


def test_epochs_and_seeds_give_unrelated_orders():
    orders = [shuffled(np.arange(1000), count=1000, key=key) for key in [(0, 0), (0, 1), (1, 0), (1, 1), (5,)]]
    orders.append(np.arange(1000))
    for number, order in enumerate(orders):
        for other in orders[:number]:
            assert (order == other).sum() < 10  # one is expected by chance
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.15


def test_each_item_is_as_likely_at_each_position():
    count, keys = 6, 1500
    seen = np.zeros((count, count))
    for key in range(keys):
        seen[np.arange(count), shuffled(np.arange(count), count=count, key=(key,))] += 1
    expected = keys / count
    chi_square = ((seen - expected) ** 2 / expected).sum()
    assert chi_square < 60  # 25 degrees of freedom: the 99.99 % point is 56.5
