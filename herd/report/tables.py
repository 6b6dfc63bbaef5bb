"""The evaluations as two tables, quality and cost; each cell keeps the exact number beside its readable form.

quality, cost = result_tables(record)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from herd.report import formats
from herd.report.record import Record, model_of, title
from herd.report.style import colours


@dataclass(frozen=True)
class Column:
    """A number of an entry: its key in evals.json, heading, unit, readable form, and the key of its interval."""

    key: str
    heading: str
    unit: str
    form: Callable[[Any], str]
    interval: str | None = None


@dataclass(frozen=True)
class Cell:
    """What stands in a table: `value` is the number as it is in evals.json."""

    key: str
    value: float | int | None
    text: str
    interval: str


@dataclass(frozen=True)
class Row:
    title: str
    note: str
    colour: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    name: str
    columns: list[Column]
    rows: list[Row]


QUALITY = [
    Column("heldout_nats", "held-out loss", "nats/token", formats.nats, "heldout_ci95"),
    Column("bits_per_byte", "bits per byte", "", formats.nats, "bits_per_byte_ci95"),
    Column("kl_mean", "KL, mean", "nats/token", formats.small),
    Column("kl_p99", "KL, 99th pct", "nats", formats.small),
    Column("top1_agreement", "same top-1", "", formats.percent),
]
COST = [
    Column("parameters", "parameters", "", formats.amount),
    Column("bytes_on_disk", "on disk", "", formats.size),
    Column("bits_per_weight", "bits/weight", "", formats.plain),
    Column("peak_memory_bytes", "peak memory", "", formats.size),
    Column("decode_tokens_per_s", "decoding", "tokens/s", formats.rate),
]


def result_tables(record: Record) -> list[Table]:
    """Quality (against the reference each entry names) and cost; empty columns and rows are left out."""
    return [
        table
        for table in (
            _table("quality", QUALITY, record, _comparison),
            _table("cost", COST, record, lambda entry: ""),
        )
        if table.rows
    ]


def _table(name: str, columns: list[Column], record: Record, note: Callable[[Mapping[str, Any]], str]) -> Table:
    used = [column for column in columns if any(entry.get(column.key) is not None for entry in record.entries)]
    entries = [entry for entry in record.entries if any(entry.get(column.key) is not None for column in used)]
    palette = colours(record.models)
    rows = [
        Row(_name(entry), note(entry), palette.get(model_of(entry), "#6b7280"), [_cell(c, entry) for c in used])
        for entry in entries
    ]
    return Table(name, used, rows)


def _name(entry: Mapping[str, Any]) -> str:
    return f"{model_of(entry)} alone" if entry.get("role") == "control" else title(entry)


def _comparison(entry: Mapping[str, Any]) -> str:
    return f"KL from {entry['reference']}" if entry.get("reference") else ""


def _cell(column: Column, entry: Mapping[str, Any]) -> Cell:
    value = entry.get(column.key)
    bounds = entry.get(column.interval) if column.interval else None
    return Cell(column.key, value, column.form(value), formats.interval(bounds))
