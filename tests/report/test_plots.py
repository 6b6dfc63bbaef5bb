"""What the plots are drawn from: best trades, label places, averages, shares of time."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_rgb
from scipy.optimize import minimize

from herd.report.plots import alpha, experts, losses, quality, throughput
from herd.report.record import read_run
from herd.report.style import NARROW, WIDE, colours, smooth, spread_apart
from tests.report.fabrication import entries, fabricate_run


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory):
    return read_run(fabricate_run(tmp_path_factory.mktemp("runs") / "nano", steps=60))


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=20))
def test_the_frontier_is_exactly_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    made = [{"bytes_on_disk": size, "heldout_nats": loss} for size, loss in points]
    line = {(e["bytes_on_disk"], e["heldout_nats"]) for e in quality.frontier(made)}
    beaten = {
        (a, b) for a, b in points for c, d in points if (c <= a and d <= b) and (c, d) != (a, b)
    }  # some other is no worse in both and better in one
    assert line == set(points) - beaten


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_labels_keep_their_order_their_distance_and_inside(places: list[float]) -> None:
    moved = spread_apart(sorted(places), 0.15)
    assert all(b - a >= 0.15 - 1e-9 for a, b in pairwise(moved))
    assert moved[0] >= -1e-9 and moved[-1] <= 1 + 1e-9


def test_labels_move_as_little_as_possible() -> None:
    places, room = np.array([0.1, 0.5, 0.52, 0.55, 0.97]), 0.1
    gaps = {"type": "ineq", "fun": lambda moved: np.diff(moved) - room}
    best = minimize(lambda moved: np.sum((moved - places) ** 2), places, constraints=[gaps], bounds=[(0, 1)] * 5)
    np.testing.assert_allclose(spread_apart(places.tolist(), room), best.x, atol=1e-5)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.integers(1, 50))
def test_the_running_mean_looks_back_only(values: list[float], window: int) -> None:
    expected = [np.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
    np.testing.assert_allclose(smooth(np.array(values), window=window), expected, atol=1e-9)


def test_the_running_mean_is_blind_to_nan() -> None:
    np.testing.assert_allclose(smooth(np.array([1.0, np.nan, 3.0]), window=2), [1, 1, 3])
    assert np.isnan(smooth(np.array([np.nan, np.nan]), window=1)).all()


def test_final_load_is_in_multiples_of_an_even_share(record) -> None:
    load_LE = experts.final_load(record, "maverick")
    assert load_LE.shape == (3, 128)
    np.testing.assert_allclose(load_LE.mean(axis=1), 1.0, atol=1e-3)
    raw = np.mean([np.array(step["experts/maverick/load"]) for step in record.steps[-6:]], axis=0)
    np.testing.assert_allclose(load_LE, raw * 128)


def test_alpha_histograms_keep_their_mass_when_averaged() -> None:
    histogram_SK = np.random.default_rng(0).dirichlet(np.ones(10), size=77)
    image_KP = alpha.over_time(histogram_SK, pixels=20)
    assert image_KP.shape == (10, 20)
    np.testing.assert_allclose(image_KP.sum(axis=0), 1.0)


def test_parts_of_a_step_add_up_to_its_wall_time(record) -> None:
    parts = dict(throughput.parts(record))
    assert parts["teacher"] == 0.52 and parts["maverick"] == 0.38
    assert sum(parts.values()) == pytest.approx(1.37)


def test_a_model_has_one_colour_and_no_two_share_one() -> None:
    palette = colours(["teacher", "a", "b", "c", "d", "e", "f"])
    assert len(set(palette.values())) == 7
    assert colours(["a", "b"])["a"] == palette["a"]


def test_controls_are_not_artefacts(record) -> None:
    assert len(quality.measured(record)) == len(entries()) - 1


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_end_labels_do_not_overlap(record, size) -> None:
    figure = losses.draw(record, size)
    labels = [text for text in figure.axes[0].texts if text.get_text().split()[0] in record.models]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    assert len(boxes) == 3
    assert all(lower.y1 <= upper.y0 for lower, upper in pairwise(boxes))
    assert max(box.x1 for box in boxes) <= figure.bbox.width


def luminance(colour) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.1)."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


DEAD = {(0, 3), (0, 4), (2, 15)}


@pytest.fixture(scope="module")
def hungry(record):
    """The run, with some experts of every model that receive nothing."""
    steps = [dict(step) for step in record.steps]
    for step in steps:
        for key in [key for key in step if key.endswith("/load")]:
            load_LE = np.array(step[key])
            load_LE[tuple(zip(*DEAD, strict=True))] = 0
            step[key] = load_LE.tolist()
    return replace(record, steps=steps)


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_every_expert_without_a_token_has_a_cross_inside_its_cell_that_stands_out(hungry, size) -> None:
    for axes in experts.draw(hungry, size).axes[: len(hungry.models)]:
        (cells,) = [found for found in axes.collections if isinstance(found, QuadMesh)]
        (crosses,) = [found for found in axes.collections if isinstance(found, LineCollection)]
        strokes = np.floor(crosses.get_segments()).astype(int)  # the (expert, layer) cells of both ends
        assert (strokes[:, 0] == strokes[:, 1]).all()
        assert sorted(map(tuple, strokes[:, 0, ::-1].tolist())) == sorted([*DEAD, *DEAD])
        dark, light = sorted((luminance(crosses.get_color()[0]), luminance(cells.cmap(cells.norm(0.0)))))
        assert (light + 0.05) / (dark + 0.05) > 7  # WCAG's highest level
