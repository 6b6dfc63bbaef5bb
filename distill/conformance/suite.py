"""Run the checks on targets and report: from Python, and for the command.

report = run([load("my.losses:kd_loss")])
assert not report.failed, report.to_text()
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distill.conformance import paths
from distill.conformance.checks import CHECKS
from distill.conformance.ranks import NAME as RANKS
from distill.conformance.ranks import TwoRanks
from distill.conformance.target import Target
from distill.conformance.verdict import Check, Status, Verdict, judge

NAMES = (*(check.name for check in CHECKS), RANKS, paths.NAME)


@dataclass(frozen=True)
class Part:
    """Verdicts on one target, or on several together."""

    targets: tuple[str, ...]
    described: str
    verdicts: tuple[Verdict, ...]

    def to_text(self) -> str:
        """One line a check, and the count."""
        return "\n".join([self.described, *(verdict.to_line() for verdict in self.verdicts)])

    def to_json(self) -> dict[str, Any]:
        """Names, description, verdicts."""
        checks = [verdict.to_json() for verdict in self.verdicts]
        return {"targets": list(self.targets), "described": self.described, "checks": checks}


@dataclass(frozen=True)
class Report:
    """All of a run."""

    parts: tuple[Part, ...]

    def names(self, status: Status) -> list[str]:
        """Checks that ended so, each once."""
        verdicts = (verdict for part in self.parts for verdict in part.verdicts)
        return list(dict.fromkeys(one.check.name for one in verdicts if one.status == status))

    @property
    def failed(self) -> list[str]:
        """Checks that some target failed."""
        return self.names("failed")

    def count(self, status: Status) -> int:
        """Verdicts that say so."""
        return sum(one.status == status for part in self.parts for one in part.verdicts)

    def to_text(self) -> str:
        """For people."""
        counts = ", ".join(f"{self.count(status)} {status}" for status in ("passed", "failed", "skipped"))
        return "\n\n".join([*(part.to_text() for part in self.parts), counts])

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        counts = {status: self.count(status) for status in ("passed", "failed", "skipped")}
        return counts | {"parts": [part.to_json() for part in self.parts]}


def run(targets: Sequence[Target], *, only: Sequence[str] = (), skip: Sequence[str] = ()) -> Report:
    """Every check (or those of `only`) on every target; with several, also whether they agree.

    `skip`: names reported as skipped, for a deviation that is meant. Raises ConfigError for a target that cannot be
    called at all.
    """
    chosen = [check for check in CHECKS if not only or check.name in only]
    with_ranks = (not only or RANKS in only) and RANKS not in skip
    with TwoRanks(targets if with_ranks else ()) as two_ranks:
        if not only or RANKS in only:
            chosen.append(two_ranks.check())
        parts = []
        for target in targets:
            described = str(target)
            verdicts = [_left_out(one) if one.name in skip else judge(one, target) for one in chosen]
            parts.append(Part((target.name,), described, tuple(verdicts)))
    if len(targets) > 1 and (not only or paths.NAME in only):
        together = paths.check_of(targets)
        verdict = _left_out(together) if together.name in skip else judge(together, targets[0])
        parts.append(Part(tuple(one.name for one in targets), "all of them together", (verdict,)))
    return Report(tuple(parts))


def _left_out(check: Check) -> Verdict:
    return Verdict(check, "skipped", None, "left out by --skip", 0)
