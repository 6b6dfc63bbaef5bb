"""Chosen allocations against uniform ones on rows that no choice was made on: KL, its interval, paired differences.

entries = compare(problem, meter, groups, {"dp": allocation, "uniform int4-g64": ...}, against="uniform int4-g64")

Intervals are 95 %, by a bootstrap over the documents that the rows come from (`evals.intervals`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evals.intervals import Groups, Interval, bootstrap_ratio
from sweeps.bits.meter import Meter
from sweeps.bits.problem import Problem


@dataclass(frozen=True)
class Entry:
    name: str
    bits: float
    active_bits: float
    export_bytes: int
    """Of all tensors."""
    kl: float
    """Nats a token, on the rows of the comparison."""
    interval: Interval | None
    difference: float
    """Of the KL, less that of the allocation compared with."""
    difference_interval: Interval | None


def compare(
    problem: Problem, meter: Meter, documents: Groups, allocations: Mapping[str, dict[str, str]], *, against: str
) -> list[Entry]:
    """One entry an allocation; differences are paired by document with the one named `against`."""
    found = {name: meter.measure(allocation) for name, allocation in allocations.items()}
    base_N = found[against].kl_N
    entries = []
    for name, divergence in found.items():
        tokens_G = documents.sum(divergence.tokens_N)
        excess_N = divergence.kl_N - base_N
        entries.append(
            Entry(
                name,
                problem.bits_of(allocations[name]),
                problem.active_bits_of(allocations[name]),
                problem.fixed_bytes + problem.bytes_of(allocations[name]),
                divergence.mean,
                bootstrap_ratio(documents.sum(divergence.kl_N), tokens_G),
                float(excess_N.sum() / divergence.tokens_N.sum()),
                None if not np.any(excess_N) else bootstrap_ratio(documents.sum(excess_N), tokens_G),
            )
        )
    return entries


def table(entries: list[Entry], against: str) -> str:
    """The entries as a Markdown table."""
    lines = [
        f"| allocation | bits | active bits | export | KL [95 %] | less {against} [95 %] |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        same = entry.name == against
        lines.append(
            f"| {entry.name} | {entry.bits:.3f} | {entry.active_bits:.3f} | {entry.export_bytes / 1e6:.3f} MB "
            f"| {entry.kl:.5f}{_shown(entry.interval)} "
            f"| {'' if same else f'{entry.difference:+.5f}{_shown(entry.difference_interval)}'} |"
        )
    return "\n".join(lines)


def _shown(interval: Interval | None) -> str:
    return "" if interval is None else f" [{interval.low:.5f}, {interval.high:.5f}]"
