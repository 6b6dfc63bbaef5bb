"""The transfer check: its grids around a known best, a whole small one, and what is refused."""

import json
from pathlib import Path

import mlflow
import pytest

from herd.llama4 import build
from herd.run.errors import Interrupted
from sweeps import __main__ as command
from sweeps.stopping import Stop
from sweeps.transfer import check, coordinates, grids, settings
from sweeps.transfer.bench import Arm, Bench, Point
from sweeps.transfer.settings import Grid, Scale, TransferCheck
from tests.sweeps.studies import ROOT

SMOKE = ROOT / "configs" / "sweeps" / "transfer" / "smoke.yaml"


class Bowl:
    """A bench whose losses are known: the best rung falls by two with every doubling, unless there are rules."""

    def __init__(self, made: TransferCheck) -> None:
        self.settings, self.trained = made, []

    def best(self, arm: Arm) -> int:
        return -9 if arm.ruled or arm.size == arm.base else -9 - 2 * (arm.size.width // arm.base.width).bit_length()

    def train(self, point: Point, stop: Stop) -> float | None:
        self.trained.append(point)
        far = abs(point.rung - self.best(point.arm))
        return None if far > 3 else 3 + 0.1 * far**2 + 0.01 * point.seed

    def identity(self, point: Point) -> dict:
        return {"arm": repr(point.arm), "rung": point.rung, "seed": point.seed}


def test_rates_are_tried_until_the_best_is_enclosed_and_never_twice(tmp_path):
    made = TransferCheck(grids={"width": Grid(factors=[1, 2, 4, 8])}, seeds=2)
    bowl, shelf = Bowl(made), grids.Shelf(tmp_path)
    curves = grids.run_grids(bowl, shelf, Stop(), lambda line: None)
    base = curves[0].best
    assert len(bowl.trained) == len(set(bowl.trained))
    for curve in curves:
        assert curve.best == bowl.best(curve.arm)
        assert {curve.best - 2, curve.best - 1, curve.best + 1, curve.best + 2, base} <= curve.losses.keys()
        assert all(len(losses) == 2 for losses in curve.losses.values())
    count = len(bowl.trained)
    again = grids.run_grids(bowl, shelf, Stop(), lambda line: None)
    assert len(bowl.trained) == count and [c.losses for c in again] == [c.losses for c in curves]


@pytest.fixture(scope="module")
def small() -> TransferCheck:
    return settings.load(SMOKE, ["tracking.enabled=false"])


@pytest.fixture(scope="module")
def bench(small) -> Bench:
    return Bench.open(small)


def test_rules_of_a_model_to_itself_train_it_to_the_same_bits(bench):
    size = Scale(width=32, depth=2, rows=2, steps=3)
    ruled, plain = (bench.train(Point(Arm(size, size, ruled), -8, 0), Stop()) for ruled in (True, False))
    assert ruled == plain != bench.train(Point(Arm(size, size, False), -8, 1), Stop())


def test_a_point_trains_with_the_rules_of_its_arm(bench):
    small, large = Scale(width=32, depth=2, rows=2, steps=4), Scale(width=64, depth=4, rows=4, steps=2)
    arm = Arm(small, large, ruled=True)
    model, optimizer = bench.start(arm, seed=3)
    rules, names = bench.rules(arm), {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr_factor"] == rules[names[id(parameter)]].lr
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.8, 0.9))  # twice the batch, the same tokens
    fresh = build(
        bench.settings.source, overrides={**bench.vocabulary, **settings.shape(bench.settings, large)}, seed=3
    )
    drawn, kept = fresh.lm_head.weight, model.lm_head.weight
    assert kept.detach().numpy() == pytest.approx(drawn.detach().numpy() * rules["lm_head.weight"].init)


def test_a_request_to_stop_ends_a_point_between_its_steps(bench, tmp_path):
    stop = Stop()
    stop.ask()
    with pytest.raises(Interrupted):
        grids.run_grids(bench, grids.Shelf(tmp_path), stop, lambda line: None)
    assert not list(tmp_path.iterdir())


def test_every_kind_of_module_is_measured_and_the_base_is_the_same_under_both(bench):
    rows = coordinates.check(bench, Stop())
    assert {row.kind for row in rows} == set(coordinates.KINDS.values()) - {"dense FFN"}  # Scout has none
    same = [row for row in rows if row.factor == 1]
    half = len(same) // 2
    assert [(row.size, row.moved) for row in same[:half]] == [(row.size, row.moved) for row in same[half:]]


def test_a_check_goes_on_where_it_was_and_its_report_is_in_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    made = settings.load(SMOKE, [f"folder={tmp_path}", "seeds=1"])
    first = check.run(made, command="again")
    points = {path: path.stat().st_mtime_ns for path in (made.home / "points").iterdir()}
    again = check.run(made, command="again")
    assert {path: path.stat().st_mtime_ns for path in (made.home / "points").iterdir()} == points
    assert again == first
    tree = json.loads((made.home / "transfer.json").read_text())
    assert [(grid["along"], grid["ruled"]) for grid in tree["grids"]] == [
        ("width", True),
        ("width", False),
        ("tokens", True),
    ]
    assert "horizon" in tree["exponents"] and tree["coordinates"]
    run_id = json.loads((made.home / "mlflow.json").read_text())["runs"]["main"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    shown = {Path(item.path).name for item in client.list_artifacts(run_id, "report")}
    assert {"report.html", "transfer.json", "rates-width.png", "moves.png", "coordinates.png"} <= shown


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--config", "absent.yaml"], "absent.yaml: no such file; --config"),
        (["--set", "seedz=3"], "seedz"),
        (["--set", "grids.width.factors=[2, 4]"], "must start at 1 and grow"),
        (["--set", "grids.width.base.width=24"], "not a multiple of head_dim = 16"),
        (["--set", "grids.batch.base.steps=10"], "must be a multiple of all of [1, 2, 4]"),
        (["--set", "grids.height={factors: [1, 2]}"], "grids.height"),
        (["--set", "source=scout-nanno"], "did you mean 'scout-nano'?"),
    ],
)
def test_a_check_that_makes_no_sense_is_one_line_and_code_2(words, fault, capsys):
    assert command.main(["transfer", *words, "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and fault in line


def test_a_plan_says_what_would_be_trained(capsys):
    assert command.main(["transfer", "--dry-run", "--set", "seeds=1"]) == 0
    assert "256 x 2, 100 steps of 8 rows" in capsys.readouterr().out
