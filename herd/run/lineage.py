"""Where a model folder came from: `lineage.json` for programs, a model card for people.

write_lineage(folder, role="export", name="scout-int4", student="scout", teacher="behemoth", ...)
read_lineage(folder)["student"]
model_card(folder, {"name": "scout-int4", "base_model": ..., "metrics": [...], "licence": ...})
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from herd.run.errors import DataError
from herd.run.files import source_root, write_atomic

FILE = "lineage.json"
FACTS = (
    "role", "name", "run_id", "run_folder", "teacher", "student", "data_fingerprint", "tokenizer_digest",
    "git_commit", "created",
)  # fmt: skip


def write_lineage(model_folder: Path, **facts: Any) -> dict[str, Any]:
    """Write `lineage.json`: every key of FACTS (None where unknown) and whatever else is given; returns it.

    `git_commit` and `created` (UTC, ISO 8601) are filled in unless given.
    """
    content = dict.fromkeys(FACTS) | {
        "git_commit": git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    content |= facts
    write_atomic(Path(model_folder) / FILE, json.dumps(content, indent=1, default=str) + "\n")
    return content


def read_lineage(model_folder: Path) -> dict[str, Any]:
    """The folder's lineage; {} for a folder this workbench did not make. Raises DataError for a damaged file."""
    path = Path(model_folder) / FILE
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); make the model folder again, or remove the file") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not an object; remove the file")
    return content


def git_commit() -> str | None:
    """Commit of the checkout herd runs from, with `-dirty` when files differ from it; None outside a checkout."""
    root = source_root()
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a tree too slow to ask
        return None
    return answer.stdout.strip() or None


def model_card(folder: Path, facts: Mapping[str, Any]) -> str:
    """Write and return `README.md`, a model card with the front matter the hub reads.

    Facts used, all optional but `name`: role, summary, base_model, teacher, student, scheme, architecture,
    parameters, run_id, run_folder, data, data_fingerprint, tokenizer_digest, git_commit, licence (an SPDX or hub
    identifier), command (reproduces it), limits (what it should not be used for), metrics (rows of one table: a
    mapping name -> value, or a list of mappings with the same keys).
    """
    sections = [_front_matter(facts), f"# {facts['name']}", facts.get("summary") or _summary(facts), _facts(facts)]
    if facts.get("metrics"):
        sections += ["## Measured", _table(facts["metrics"])]
    if facts.get("command"):
        sections += ["## How to make it again", f"```\n{facts['command']}\n```"]
    if facts.get("limits"):
        sections += ["## Limits", facts["limits"]]
    text = "\n\n".join(section for section in sections if section) + "\n"
    write_atomic(Path(folder) / "README.md", text)
    return text


def _front_matter(facts: Mapping[str, Any]) -> str:
    tags = ["distillation", *([facts["role"]] if facts.get("role") else [])]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines.append(f"license: {_quoted(facts.get('licence') or 'unknown')}")
    if facts.get("base_model"):
        lines.append(f"base_model: {_quoted(facts['base_model'])}")
    return "\n".join([*lines, "tags:", *(f"- {_quoted(tag)}" for tag in tags), "---"])


def _quoted(value: Any) -> str:
    """A YAML string on one line, whatever is in it."""
    return yaml.safe_dump(str(value), default_style='"', allow_unicode=True, width=float("inf")).strip()


def _summary(facts: Mapping[str, Any]) -> str:
    what = {
        "teacher": "A teacher: the model its students learn from.",
        "student": f"A student distilled from {facts.get('teacher') or 'no teacher (hard targets only)'}.",
        "export": f"{facts.get('student') or facts.get('base_model')} compressed to {facts.get('scheme')}.",
    }
    return what.get(facts.get("role", ""), "")


def _facts(facts: Mapping[str, Any]) -> str:
    labels = {
        "base_model": "Base model", "teacher": "Teacher", "student": "Student", "scheme": "Compression",
        "architecture": "Architecture", "parameters": "Parameters", "data": "Data",
        "data_fingerprint": "Data fingerprint", "tokenizer_digest": "Tokenizer digest", "licence": "Licence",
        "run_id": "MLflow run", "run_folder": "Run folder", "git_commit": "Code",
    }  # fmt: skip
    rows = [{"": label, " ": facts[key]} for key, label in labels.items() if facts.get(key) is not None]
    return _table(rows)


def _table(metrics: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, numbers to four significant places, columns in the order they first appear."""
    if isinstance(metrics, Mapping):
        metrics = [{"measure": name, "value": value} for name, value in metrics.items()]
    columns = list(dict.fromkeys(key for row in metrics for key in row))
    lines = [_row(columns), _row(["---"] * len(columns))]
    return "\n".join(lines + [_row([_cell(row.get(column)) for column in columns]) for row in metrics])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return " .. ".join(_cell(item) for item in value)
    return str(value).replace("|", "\\|").replace("\n", " ")
