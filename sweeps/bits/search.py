"""Optuna over whole allocations: KL as measured, bytes, and bytes a token reads, all three to be small.

search = Search.open(url, problem, sampler)
search.enqueue(allocations);  search.run(meter, trials=64, check_stop=...);  search.points()

Several processes may run one search, and a killed one's trial is taken up again (`sweeps.ledger`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import TrialState

from sweeps import storages
from sweeps.bits.meter import Meter
from sweeps.bits.problem import Problem
from sweeps.ledger import Ledger
from sweeps.settings import Sampler


@dataclass(frozen=True)
class Point:
    """An allocation with what it costs and what it was measured to lose."""

    allocation: dict[str, str]
    kl: float
    """Nats a token, on the rows of the search."""
    bytes: int
    active: int
    trial: int


@dataclass(frozen=True)
class Search:
    problem: Problem
    study: optuna.Study
    sampler: Sampler

    @classmethod
    def open(cls, url: str, problem: Problem, sampler: Sampler) -> "Search":
        """The study `bits-SAMPLER` of a storage, made if it is not there."""
        storages.quiet()
        storage = storages.patiently(lambda: storages.open_storage(url), url)
        study = optuna.create_study(
            storage=storage,
            study_name=f"bits-{sampler.kind}",
            sampler=storages.make_sampler(sampler),
            directions=["minimize"] * 3,
            load_if_exists=True,
        )
        study.set_metric_names(["kl", "bytes", "active_bytes"])
        return cls(problem, study, sampler)

    def enqueue(self, allocations: Sequence[dict[str, str]]) -> None:
        """Let allocations be the next trials, each once, however often it is asked for."""
        for allocation in allocations:
            self.study.enqueue_trial(allocation, skip_if_exists=True)

    def run(self, meter: Meter, *, trials: int, check_stop: Callable[[], None]) -> None:
        """Measure until there are so many trials; an allocation that was measured before is not measured again."""
        ledger = Ledger(self.study, trials)
        known = {tuple(point.allocation.values()): point.kl for point in self.points()}
        while True:
            check_stop()
            ledger.recover()
            if not ledger.room():
                return
            self.study.sampler = storages.make_sampler(self.sampler, len(self.study.get_trials(deepcopy=False)))
            trial = self.study.ask()
            if not ledger.claim(trial):
                continue
            allocation = {
                group.name: trial.suggest_categorical(group.name, self.problem.labels) for group in self.problem.groups
            }
            key = tuple(allocation.values())
            if key not in known:
                known[key] = meter.measure(allocation).mean
            self.study.tell(trial, [known[key], self.problem.bytes_of(allocation), self.problem.active_of(allocation)])

    def points(self) -> list[Point]:
        """Every measured allocation once, by the first trial that had it."""
        found: dict[tuple[str, ...], Point] = {}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            allocation = {group.name: trial.params[group.name] for group in self.problem.groups}
            kl, whole, active = trial.values
            found.setdefault(tuple(allocation.values()), Point(allocation, kl, int(whole), int(active), trial.number))
        return list(found.values())


def front(points: Sequence[Point], size: Callable[[Point], int]) -> list[Point]:
    """Points that no other beats in KL and the given size, by rising size."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (size(point), point.kl)):
        if not kept or point.kl < kept[-1].kl:
            kept.append(point)
    return kept
