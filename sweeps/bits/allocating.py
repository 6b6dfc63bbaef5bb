"""From a model folder to allocations: sensitivities, dynamic programme, search, comparison on held-out rows, files.

print(run(options));  print(describe(options))              # options: sweeps.bits.command
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from evals.heldout import rows_from
from evals.intervals import group_rows
from evals.rows import Rows
from herd.data.corpora import check_source
from herd.run.errors import ConfigError, Interrupted
from herd.run.files import size
from herd.run.folders import check_folder, make_folder
from quant.allocations import BF16
from quant.exports import family
from sweeps.bits import results, solutions
from sweeps.bits.comparison import compare
from sweeps.bits.meter import Meter
from sweeps.bits.problem import Problem, make_problem
from sweeps.bits.results import PLANNED, SEARCHED, Outcome
from sweeps.bits.search import Point, Search
from sweeps.bits.sensitivities import Sensitivities
from sweeps.bits.solutions import Budgets
from sweeps.settings import Sampler
from sweeps.stopping import stop_signals


def run(options: argparse.Namespace) -> str:
    """Measure what is missing, write and track the results; returns them as text. Interrupted when told to stop."""
    problem, budgets = _problem(options)
    rows = rows_from(options.data, options.model, rows=options.rows, part="calibration")
    held_out = rows_from(options.data, options.model, rows=options.check_rows)
    make_folder(options.out, "--out")
    table = Sensitivities.open(options.out, problem, identity(problem, rows), around=options.around)
    search = Search.open(
        f"sqlite:///{options.out / 'study.db'}", problem, Sampler(kind=options.sampler, seed=options.seed)
    )
    with stoppable() as check_stop:
        meter = Meter(problem, rows, micro_rows=options.micro_rows)
        table.fill(meter, check_stop)
        loss_GC = table.loss_GC()
        planned = solutions.best(problem, loss_GC, budgets)
        uniform = [problem.uniform(label) for label in problem.labels]
        total, active = (solutions.ladder(problem, loss_GC, cost_GC) for cost_GC in solutions.costs(problem))
        search.enqueue([*uniform, planned, *total, *active])
        search.run(meter, trials=options.trials, check_stop=check_stop)
        outcome = _outcome(options, budgets, table, search.points(), planned, total, meter)
        judge = Meter(problem, held_out, micro_rows=options.micro_rows, model=meter.model)
        entries = compare(
            problem, judge, group_rows(held_out.documents_N), outcome.allocations, against=outcome.against
        )
    text = results.write(options.out, outcome, entries)
    results.track(options, outcome, entries, rows, held_out)
    return text


def describe(options: argparse.Namespace) -> str:
    """Groups, what each choice takes, what would be measured. No weight is read."""
    check_folder(options.out, "--out")
    check_source(options.data)
    problem, budgets = _problem(options)
    lines = [
        f"{len(problem.groups)} groups, {problem.weights:,} weights, {problem.active_weights:,} read for a token",
        "",
    ]
    alike: dict[tuple, list[str]] = {}
    for group in problem.groups:
        alike.setdefault((group.weights, group.experts), []).append(group.name)
    lines += [f"  {len(names):4d} x {weights:,} weights  {family(names)}" for (weights, _), names in alike.items()]
    lines += ["", f"{'choice':18s}{'bits':>8s}{'active':>8s}  export"]
    for label in problem.labels:
        every = problem.uniform(label)
        whole = problem.fixed_bytes + problem.bytes_of(every)
        lines.append(f"{label:18s}{problem.bits_of(every):8.3f}{problem.active_bits_of(every):8.3f}  {size(whole)}")
    tokens = options.data.sequence_length * (options.rows + options.check_rows)
    logits = 2 * tokens * problem.vocabulary
    alone = sum(label != options.around for label in problem.labels) * len(problem.groups)
    lines += [
        "",
        f"budget    {budgets.describe()}",
        f"passes    {alone} of one group alone (others {options.around}), then {options.trials} allocations "
        f"({options.sampler}), over {options.rows} rows of {options.data.sequence_length} tokens",
        f"memory    {size(problem.fixed_bytes + 2 * problem.weights)} for the model in bf16, {size(logits)} for logits",
    ]
    return "\n".join(lines)


def identity(problem: Problem, rows: Rows) -> dict[str, Any]:
    """What measurements depend on, as JSON gives it back."""
    content = {
        "model": problem.source.identity(),
        "rows": [rows.fingerprint, len(rows), rows.input_ids_NT.shape[1]],
        "choices": list(problem.labels),
    }
    return json.loads(json.dumps(content))


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """A function that raises Interrupted after SIGINT or SIGTERM: everything measured so far is on disk."""
    with stop_signals() as stop:

        def check() -> None:
            if stop.asked:
                raise Interrupted("stopped; what was measured is kept, and the same command goes on")

        yield check


def _problem(options: argparse.Namespace) -> tuple[Problem, Budgets]:
    problem = make_problem(options.model, options.choices, leave_out=options.leave_out)
    budgets = Budgets.of(problem, options.bits, options.active_bits)
    if options.around is None:
        options.around = budgets.dearest(problem)
    if options.around not in (*problem.labels, BF16):
        raise ConfigError(f"--around {options.around}: use {BF16} or one of --choices: {', '.join(problem.labels)}")
    return problem, budgets


def _outcome(
    options: argparse.Namespace,
    budgets: Budgets,
    table: Sensitivities,
    points: list[Point],
    planned: dict[str, str],
    ladder: list[dict[str, str]],
    meter: Meter,
) -> Outcome:
    """The best within the budgets, of those measured; the best uniform one among them is what it is compared with."""
    problem = table.problem
    kl = {tuple(point.allocation.values()): point.kl for point in points}
    allocations = {f"uniform {label}": problem.uniform(label) for label in problem.labels if label != BF16}
    for allocation in (planned, *allocations.values()):  # few trials may have left them out
        if tuple(allocation.values()) not in kl:
            kl[tuple(allocation.values())] = meter.measure(allocation).mean
    held = [point.allocation for point in points if budgets.hold(problem, point.allocation)]
    best = min([planned, *held], key=lambda allocation: kl[tuple(allocation.values())])
    fitting = [name for name, allocation in allocations.items() if budgets.hold(problem, allocation)]
    against = min(fitting, key=lambda name: kl[tuple(allocations[name].values())], default=PLANNED)
    chosen = {PLANNED: planned, SEARCHED: best}
    return Outcome(options.model, problem, budgets, table, points, chosen | allocations, kl, against, ladder)
