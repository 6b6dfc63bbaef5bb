"""The outcome of one evaluation: typed numbers, the entry written to evals.json, and the table people read.

add_entries("runs/nano/evals.json", [result.entry()])
print(table([result]))            # a block a model
print(summary([result]))          # a line a model
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals.intervals import Interval
from herd.run.errors import DataError
from herd.run.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class Result:
    """Losses in nats per token, sizes in bytes, intervals at 95 %; None where it was not measured."""

    name: str
    role: str | None
    student: str | None
    """Which student an export is of."""
    scheme: str | None
    path: str
    data: str
    rows: int
    tokens: int
    documents: int
    heldout_nats: float
    heldout_ci95: Interval | None
    bits_per_byte: float
    bits_per_byte_ci95: Interval | None
    reference: str | None
    reference_nats: float | None
    loss_difference: float | None
    """Mean over tokens of model's minus reference's loss, on the same rows."""
    loss_difference_ci95: Interval | None
    kl_mean: float | None
    """KL(reference || model), nats per token."""
    kl_mean_ci95: Interval | None
    kl_p99: float | None
    top1_agreement: float | None
    top1_agreement_ci95: Interval | None
    parameters: int
    """Of the architecture before quantisation, tied weights counted once."""
    bytes_on_disk: int
    """Weight files only."""
    folder_bytes: int
    """Weights, tokenizer, configuration, everything."""
    bits_per_weight: float
    """Bits of stored tensors (scales included) per parameter."""
    quantised_bits_per_weight: float | None
    """The same over the quantised layers alone."""
    peak_memory_bytes: int | None
    decode_tokens_per_s: float | None

    def entry(self) -> dict[str, Any]:
        """As it stands in evals.json."""
        return asdict(self)


def add_entries(path: str | Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Put entries into an evals.json; an entry about the same model folder replaces the earlier one in its place."""
    path = Path(path)
    kept = {entry["path"]: entry for entry in read_entries(path)}
    kept.update({entry["path"]: dict(entry) for entry in entries})
    write_atomic(path, json.dumps({"entries": list(kept.values())}, indent=2) + "\n")


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of an evals.json, none when there is no file. Raises DataError for a file that is something else."""
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["entries"]
    except (ValueError, KeyError, TypeError) as cause:
        raise DataError(f"{path}: not a list of evaluations ({cause}); remove it or name another file") from cause


def table(results: Iterable[Result]) -> str:
    """Plain text, one block a model: what was measured, its value, its 95 % interval."""
    return "\n\n".join("\n".join(_lines(result)) for result in results)


def summary(results: Iterable[Result]) -> str:
    """Plain text, one line a model: what decides between artefacts."""
    header = ("model", "held-out nats [95 %]", "KL to reference, mean", "weights", "bits each", "decoding")
    rows = [header, *(_cells(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _cells(result: Result) -> tuple[str, ...]:
    interval, speed = result.heldout_ci95, result.decode_tokens_per_s
    return (
        result.name,
        f"{result.heldout_nats:.4f}" + (f" [{interval.low:.3f}, {interval.high:.3f}]" if interval else ""),
        "" if result.reference is None else f"{result.kl_mean:.5f} ({result.reference})",
        f"{result.bytes_on_disk / 1e6:.2f} MB",
        f"{result.bits_per_weight:.2f}",
        "" if speed is None else f"{speed:.0f} tokens/s",
    )


def _lines(result: Result) -> list[str]:
    rows: list[tuple[str, str, Interval | None, str]] = [
        ("held-out loss", f"{result.heldout_nats:.4f}", result.heldout_ci95, "nats/token"),
        ("bits per byte", f"{result.bits_per_byte:.4f}", result.bits_per_byte_ci95, ""),
    ]
    if result.reference is not None:
        rows += [
            ("loss above reference", f"{result.loss_difference:+.4f}", result.loss_difference_ci95, "nats/token"),
            ("KL from reference", f"{result.kl_mean:.5f}", result.kl_mean_ci95, "nats/token"),
            ("KL, 99th percentile", f"{result.kl_p99:.5f}", None, "nats"),
            ("top-1 agreement", f"{result.top1_agreement:.4f}", result.top1_agreement_ci95, ""),
        ]
    rows += [
        ("parameters", f"{result.parameters:,}", None, ""),
        ("weights on disk", f"{result.bytes_on_disk / 1e6:.2f}", None, f"MB (folder {result.folder_bytes / 1e6:.2f})"),
        ("bits per weight", f"{result.bits_per_weight:.2f}", None, ""),
    ]
    if result.quantised_bits_per_weight is not None:
        rows.append(("  in quantised layers", f"{result.quantised_bits_per_weight:.2f}", None, ""))
    if result.peak_memory_bytes is not None:
        rows.append(("peak memory", f"{result.peak_memory_bytes / 1e6:.1f}", None, "MB above an idle process"))
    if result.decode_tokens_per_s is not None:
        rows.append(("decoding", f"{result.decode_tokens_per_s:.1f}", None, "tokens/s, greedy, batch 1"))
    against = f" against {result.reference}" if result.reference else ""
    title = f"{result.name}{f' ({result.scheme})' if result.scheme else ''}{against}"
    scope = f"{result.rows} rows, {result.tokens:,} tokens of {result.documents} documents of {result.data}"
    return [title, scope] + [_line(*row) for row in rows]


def _line(label: str, value: str, interval: Interval | None, unit: str) -> str:
    digits = len(value.rpartition(".")[2])
    between = f"[{interval.low:.{digits}f}, {interval.high:.{digits}f}]" if interval else ""
    return f"  {label:<22}{value:>12}  {between:<20}{unit}".rstrip()
