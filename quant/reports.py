"""What the export gate found: a list of checks, each with a reason, and whether the folder passes.

report = quant.export(...);  report.passed;  report.reason
"""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """What the gate saw. `gate.json` in the folder holds it."""

    checks: list[Check]
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of the files with weights, of config.json and of the tokenizer's vocabulary (`quant.file_checks`)."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """The failed checks, on one line."""
        return "; ".join(f"{check.name}: {check.detail}" for check in self.checks if not check.passed)

    def to_text(self) -> str:
        """One line a check."""
        return "\n".join(f"{'ok  ' if c.passed else 'FAIL'} {c.name}: {c.detail}" for c in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Report":
        return cls([Check(**check) for check in content["checks"]], content["facts"], content["files"])


def few(items: list[str]) -> str:
    """The first three of them, and how many more there are."""
    shown = ", ".join(items[:3])
    return shown if len(items) <= 3 else f"{shown} and {len(items) - 3} more"
