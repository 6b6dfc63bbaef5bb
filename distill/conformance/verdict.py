"""What a check is, the comparisons it makes, and the verdict on one target; no torch.

    def zero_at_identity(target): yield equal("loss of identical models", 0.0, got, within=1e-9)

A check passes when all its comparisons hold. One that does not apply raises NotApplicable: it is reported as skipped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]


class NotApplicable(Exception):
    """The target cannot be asked this; the message says why."""


@dataclass(frozen=True)
class Comparison:
    """One number (or answer) held against what it should be."""

    what: str
    relation: str
    expected: float | str
    got: float | str
    within: float
    holds: bool

    def __str__(self) -> str:
        tolerance = f" within {self.within:.0e}" if self.within else ""
        wanted = f"{self.relation} {_show(self.expected)}".lstrip()
        return f"{self.what}: expected {wanted}{tolerance}, got {_show(self.got)}"


def equal(what: str, expected: float, got: float, *, within: float) -> Comparison:
    """|got - expected| <= within; NaN holds nowhere."""
    return Comparison(what, "=", expected, got, within, abs(got - expected) <= within)


def at_least(what: str, least: float, got: float, *, within: float = 0.0) -> Comparison:
    """got >= least - within."""
    return Comparison(what, ">=", least, got, within, got >= least - within)


def at_most(what: str, most: float, got: float, *, within: float = 0.0) -> Comparison:
    """got <= most + within."""
    return Comparison(what, "<=", most, got, within, got <= most + within)


def differs(what: str, other: float, got: float, *, by: float) -> Comparison:
    """|got - other| > by."""
    return Comparison(what, f"other by more than {by:.0e} than", other, got, 0.0, abs(got - other) > by)


def answers(what: str, expected: str, got: str) -> Comparison:
    """The same words."""
    return Comparison(what, "", expected, got, 0.0, got == expected)


def _show(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


@dataclass(frozen=True)
class Check:
    """One thing every distillation loss must do."""

    name: str
    asks: str
    """What must hold, in one line."""
    run: Callable[[Any], Iterator[Comparison]]
    """Given a target; raises NotApplicable."""
    defects: tuple[int, ...] = ()
    """Numbers of docs/conformance.md's table; none: a property no known defect is named after."""
    seen: str = ""
    """Where in the wild."""


@dataclass(frozen=True)
class Verdict:
    """What one check found on one target."""

    check: Check
    status: Status
    comparison: Comparison | None
    """The first that does not hold; else the one nearest to its tolerance."""
    reason: str
    """Why it was skipped, or what the target raised."""
    num_comparisons: int

    def to_json(self) -> dict[str, Any]:
        """Numbers as numbers; NaN and infinities, which JSON lacks, as words."""
        out = {"check": self.check.name, "status": self.status, "asks": self.check.asks}
        out |= {"defects": list(self.check.defects), "seen": self.check.seen}
        out |= {"comparisons": self.num_comparisons, "reason": self.reason}
        if self.comparison is not None:
            facts = self.comparison
            out |= {"what": facts.what, "relation": facts.relation, "within": facts.within}
            out |= {"expected": _plain(facts.expected), "got": _plain(facts.got)}
        return out

    def to_line(self) -> str:
        """For people; failures first state what was asked."""
        status = self.status.upper() if self.status == "failed" else self.status
        found = self.reason or str(self.comparison)
        if self.status == "passed":
            found = f"{self.num_comparisons:4} hold, such as {found}"
        if self.status == "failed":
            seen = f"\n{'':34}seen in: {self.check.seen}" if self.check.seen else ""
            found = f"{self.check.asks}\n{'':34}{found}{seen}"
        return f"  {status:8}{self.check.name:24}{found}"


def _plain(value: float | str) -> float | str:
    return value if isinstance(value, str) or abs(value) < float("inf") else str(value)


def judge(check: Check, target: Any) -> Verdict:
    """Run one check on one target; what the target raises is a failure with its words."""
    found: list[Comparison] = []
    try:
        found.extend(check.run(target))
    except NotApplicable as why:
        return Verdict(check, "skipped", None, str(why), 0)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        return Verdict(check, "failed", None, f"raised {type(error).__name__}: {words[0]}", len(found))
    if not found:
        raise RuntimeError(f"check {check.name} compared nothing: a bug of the suite")
    wrong = [comparison for comparison in found if not comparison.holds]
    nearest = max(found, key=_nearness)
    return Verdict(check, "failed" if wrong else "passed", wrong[0] if wrong else nearest, "", len(found))


def _nearness(comparison: Comparison) -> float:
    if comparison.within == 0 or isinstance(comparison.got, str) or isinstance(comparison.expected, str):
        return 0.0
    return abs(comparison.got - comparison.expected) / comparison.within if comparison.relation == "=" else 0.0
