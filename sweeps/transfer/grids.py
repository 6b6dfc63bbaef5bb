"""The rates tried at every size, around wherever the best turns out to be, each point kept in a file of its own.

shelf = Shelf(settings.home / "points")
for curve in run_grids(bench, shelf, stop, tell): curve.losses[rung]          # one loss a seed
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from herd.run.files import write_atomic
from sweeps.stopping import Stop
from sweeps.transfer.bench import Arm, Bench, Point
from sweeps.transfer.settings import GRID_STEP, Along, TransferCheck

Losses = dict[int, list[float]]
"""Rung -> held-out nats of every seed; infinite where it diverged."""


@dataclass(frozen=True)
class Shelf:
    """Finished points by what decides them; those of other settings are not touched."""

    folder: Path

    def loss(self, bench: Bench, point: Point, stop: Stop) -> tuple[float, float]:
        """(held-out nats, CPU seconds it took now): read when it is there, else trained and kept."""
        identity = bench.identity(point)
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
        path = self.folder / f"{key}.json"
        if path.exists():
            return _number(json.loads(path.read_text())["loss"]), 0.0
        started = time.process_time()
        loss = bench.train(point, stop)
        seconds = time.process_time() - started
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"point": identity, "loss": loss, "cpu_seconds": seconds}, indent=1) + "\n")
        return _number(loss), seconds


@dataclass
class Curve:
    """Loss over the rate at one size, by the base's rate."""

    along: Along
    factor: int
    ruled: bool
    arm: Arm
    losses: Losses = field(default_factory=dict)

    def mean(self, rung: int) -> float:
        """Over the seeds."""
        return sum(self.losses[rung]) / len(self.losses[rung])

    @property
    def best(self) -> int:
        """The rung of the lowest mean."""
        return min(self.losses, key=self.mean)


def curves_of(settings: TransferCheck) -> list[Curve]:
    """Every curve, without points. A base is the same under the rules and without: trained once, shown in both."""
    return [
        Curve(along, factor, ruled, Arm(grid.base, size, ruled and factor > 1))
        for along, grid in settings.grids.items()
        for ruled in (True, False)[: 2 if grid.standard else 1]
        for factor, size in zip(grid.factors, grid.sizes(along), strict=True)
    ]


def run_grids(bench: Bench, shelf: Shelf, stop: Stop, tell: Callable[[str], None]) -> list[Curve]:
    """Every curve with all seeds. One seed after another, so that what is there early is whole, if noisy.

    tell: is given a line for every point that was trained now. Raises Interrupted; what is finished is kept.
    """
    settings = bench.settings
    curves: list[Curve] = []
    for count in range(1, settings.seeds + 1):
        curves = curves_of(settings)
        for number, curve in enumerate(curves):
            if curve.factor == 1:
                wanted = {round(math.log2(settings.optim.lr) / GRID_STEP)}
                base = curve
            else:  # what the base found is measured here too, however far the best has moved
                wanted = {curves[number - 1].best, base.best}
            _bracket(curve, wanted, bench, shelf, range(count), stop, tell)
    return curves


def _bracket(
    curve: Curve,
    wanted: set[int],
    bench: Bench,
    shelf: Shelf,
    seeds: Sequence[int],
    stop: Stop,
    tell: Callable[[str], None],
) -> None:
    """Fill a curve from the rungs that are wanted outwards until the best has `bracket` rates on either side."""
    settings = bench.settings
    reach = settings.bracket
    first = round(math.log2(settings.optim.lr) / GRID_STEP)
    allowed = range(first - settings.widest, first + settings.widest + 1)
    while True:
        around = range(curve.best - reach, curve.best + reach + 1) if curve.losses else wanted
        missing = [rung for rung in around if rung in allowed and rung not in curve.losses]
        if not missing:
            return
        for rung in missing:
            curve.losses[rung] = []
            for seed in seeds:
                loss, seconds = shelf.loss(bench, Point(curve.arm, rung, seed), stop)
                curve.losses[rung].append(loss)
                if seconds:
                    tell(
                        f"{curve.along} x{curve.factor}{'' if curve.ruled else ' standard'}, seed {seed}, "
                        f"rate 2^{rung * GRID_STEP:g}: {loss:.4f}  ({seconds:.1f} CPU s)"
                    )


def _number(loss: float | None) -> float:
    return math.inf if loss is None else loss
