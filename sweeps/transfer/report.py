"""A transfer check's results: transfer.json, plots/*.png and report.html in its folder, and the same in words.

outcome = summarise(check, curves, coordinates); page = write(check, outcome, curves)
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from herd.report.pictures import fill_template, make_picture
from herd.report.style import NARROW, WIDE
from herd.run.files import write_atomic
from sweeps.transfer import fits, pictures
from sweeps.transfer.coordinates import Coordinate
from sweeps.transfer.fits import Flatness, GridFinding, Slope
from sweeps.transfer.grids import Curve
from sweeps.transfer.settings import TransferCheck

TEMPLATE = "transfer.html.j2"
RESULT = "transfer.json"
EXPONENTS = {"batch": ("batch", 0.5, 1), "tokens": ("horizon", None, -1)}
"""Direction -> what its exponent is called, what the rules take for it, sign of the rate's growth with it."""


@dataclass(frozen=True)
class Outcome:
    findings: tuple[GridFinding, ...]
    coordinates: tuple[Flatness, ...]
    exponents: dict[str, Slope]
    """Fitted ones of the rate: `batch` (at the same tokens, batch^x) and `horizon` (tokens^-x)."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; of coordinates slope and ratio beside the means."""
        return {
            "grids": [
                asdict(finding) | {"moved": finding.moved, "excess": finding.excess} for finding in self.findings
            ],
            "exponents": {name: asdict(slope) for name, slope in self.exponents.items()},
            "coordinates": [asdict(flat) | {"ratio": flat.ratio} for flat in self.coordinates],
        }

    def table(self) -> str:
        """The findings as text, a line each."""
        head = f"{'along':7} {'rules':8}  best rate by size, then its slope, move and cost of carrying over"
        lines = [head] if self.findings else []
        for finding in self.findings:
            rates = "  ".join(f"x{size.factor} {size.fitted:.4f}" for size in finding.sizes)
            lines.append(
                f"{finding.along:7} {'ours' if finding.ruled else 'standard':8}  {rates}  "
                f"slope {interval_text(finding.slope)}  moves {finding.moved:.1f} steps  costs {finding.excess:.2%}"
            )
        lines += [f"{name} exponent {interval_text(slope)}" for name, slope in self.exponents.items()]
        for along, ruled in dict.fromkeys((flat.along, flat.ruled) for flat in self.coordinates):
            flats = [flat for flat in self.coordinates if (flat.along, flat.ruled) == (along, ruled)]
            worst = max(flats, key=lambda flat: flat.ratio)
            lines.append(
                f"activations over {along}, {'ours' if ruled else 'standard'}: largest over smallest "
                f"{worst.ratio:.3g} at most ({worst.kind})"
            )
        return "\n".join(lines)


def summarise(check: TransferCheck, curves: Sequence[Curve], coordinates: Sequence[Coordinate]) -> Outcome:
    """Every grid's finding, the rules' first, and the exponents they imply."""
    pairs = list(dict.fromkeys((curve.along, curve.ruled) for curve in curves))
    findings = tuple(fits.read_grid(curves, along=along, ruled=ruled) for along, ruled in pairs)
    exponents = {}
    for finding in findings:
        if finding.ruled and finding.along in EXPONENTS:
            name, assumed, sign = EXPONENTS[finding.along]
            exponents[name] = fits.exponent(finding, check.horizon_exponent if assumed is None else assumed, sign=sign)
    return Outcome(findings, tuple(fits.read_coordinates(coordinates)) if coordinates else (), exponents)


def write(check: TransferCheck, outcome: Outcome, curves: Sequence[Curve]) -> Path:
    """Write result, plots and page, each file atomically; returns the page's path."""
    check.home.mkdir(parents=True, exist_ok=True)
    tree = {"settings": check.model_dump(mode="json"), **outcome.to_json()}
    write_atomic(check.home / RESULT, json.dumps(tree, indent=1) + "\n")
    wide, narrow = (pictures.draw(curves, outcome.findings, outcome.coordinates, size) for size in (WIDE, NARROW))
    made = [
        make_picture(heading, caption, figure, narrow[name][2], check.home / "plots" / f"{name}.png")
        for name, (heading, caption, figure) in wide.items()
    ]
    page = check.home / "report.html"
    html = fill_template(
        "sweeps.transfer", TEMPLATE, check=check, outcome=outcome, pictures=made, interval_text=interval_text
    )
    write_atomic(page, html)
    return page


def interval_text(slope: Slope) -> str:
    """0.12 [0.03, 0.21]."""
    if slope.interval is None:
        return f"{slope.value:+.2f}"
    low, high = slope.interval
    return f"{slope.value:+.2f} [{low:+.2f}, {high:+.2f}]"
