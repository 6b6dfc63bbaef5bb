"""What happened, in words, from the numbers alone: one paragraph, honest about what is not known.

sentences = summarise(record)
"""

from typing import Any

import numpy as np

from herd.report import formats
from herd.report.record import Record, model_of, title


def summarise(record: Record) -> list[str]:
    """The sentences of the summary, in order. Only those whose numbers exist, and one that names what is missing."""
    sentences = [_training(record), *_broken(record), *_quality(record), *_controls(record), *_compression(record)]
    if absent := missing(record):
        sentences.append(f"Not known from this run folder: {formats.listed(absent)}.")
    return [sentence for sentence in sentences if sentence]


def missing(record: Record) -> list[str]:
    """What a complete run would have and this one has not."""
    exported = [entry for entry in record.entries if entry.get("role") == "export"]
    wanted = [student for student in record.config.get("students", {}).values() if student.get("quantize")]
    distilled = record.teacher_mode in ("codistill", "frozen", "cached")
    checks = {
        "the configuration": not record.config,
        "training metrics": not record.steps,
        "final evaluations": not record.entries,
        "what compression cost": bool(wanted) and bool(record.entries) and not exported,
        "the gain over training alone (no control was evaluated)": distilled
        and bool(record.entries)
        and not controls(record),
    }
    return [name for name, absent in checks.items() if absent]


def controls(record: Record) -> dict[str, dict[str, Any]]:
    """Student -> entry of the same student trained without a teacher (role `control`, the student's name)."""
    return {model_of(entry): entry for entry in record.entries if entry.get("role") == "control"}


def final_losses(record: Record) -> dict[str, float]:
    """Model -> held-out nats per token: as evaluated, else as last seen during training."""
    seen = {model: record.column(f"heldout/{model}").value_S for model in record.models}
    losses = {model: float(value_S[-1]) for model, value_S in seen.items() if len(value_S)}
    evaluated = [entry for entry in record.entries if entry.get("role") in ("teacher", "student")]
    return losses | {model_of(e): e["heldout_nats"] for e in evaluated if e.get("heldout_nats") is not None}


def finished(record: Record) -> bool:
    """True when every planned step was logged (or the plan is unknown)."""
    return record.planned_steps is None or record.last_step >= record.planned_steps


def evaluated_text(record: Record) -> str:
    """What the models were evaluated on, if all evaluations agree about it."""
    scopes = {
        (entry["rows"], entry["tokens"], entry["documents"], entry["data"])
        for entry in record.entries
        if "tokens" in entry
    }
    if len(scopes) != 1:
        return ""
    rows, tokens, documents, data = scopes.pop()
    return f"Evaluated on {rows} rows, {tokens:,} tokens of {documents} documents of {data}."


def _training(record: Record) -> str:
    if not record.steps:
        return f"The run {record.name} has logged no step."
    last = record.steps[-1]
    text = f"The run {record.name} {_how(record)} for {record.last_step:,} steps"
    if last.get("tokens"):
        each = last["tokens"] / record.last_step
        text += f" of {each:,.0f} tokens ({formats.amount(last['tokens'])} in all)"
    if last.get("elapsed_s"):
        text += f" in {formats.duration(last['elapsed_s'])}"
    if ranks := record.facts.get("world_size"):
        text += f" on {ranks} rank{'s' if ranks != 1 else ''}"
    if not finished(record):
        text += f"; {record.planned_steps:,} were planned, so it was interrupted or is still running"
    return text + "."


def _how(record: Record) -> str:
    students = formats.listed(record.students) if record.students else "its models"
    teacher = record.config.get("teacher", {})
    source, routes = teacher.get("source", ""), teacher.get("routes", {})
    if routes:
        listed = formats.listed([f"{route['source']} for {name}" for name, route in routes.items()])
        what = "cached targets" if record.teacher_mode == "cached" else "frozen teachers"
        return f"trained {students} from {what} ({listed})"
    match record.teacher_mode:
        case "codistill":
            return f"trained {students} together with their teacher ({source})"
        case "frozen":
            return f"trained {students} from a frozen teacher ({source})"
        case "cached":
            return f"trained {students} from cached targets"
        case "none":
            return f"trained {students} without a teacher"
        case _:
            return f"trained {students}"


def _broken(record: Record) -> list[str]:
    """A loss that stopped being a number is the first thing to know."""
    found = []
    for model in record.models:
        series = record.column("teacher/ce" if model == "teacher" else f"student/{model}/ce")
        bad_S = series.step_S[~np.isfinite(series.value_S)]
        if len(bad_S):
            found.append(f"The loss of {model} was not finite at step {bad_S[0]:.0f}.")
    return found


def _quality(record: Record) -> list[str]:
    losses = final_losses(record)
    if not losses:
        return []
    where = "On held-out text" if record.entries else f"At the last held-out check (step {_last_check(record)})"
    teacher = losses.pop("teacher", None)
    parts = [f"the teacher reaches {formats.nats(teacher)} nats per token"] if teacher is not None else []
    for student, loss in losses.items():
        unit = "" if parts else " nats per token"
        behind = "" if teacher is None else f" ({formats.signed_nats(loss - teacher)})"
        parts.append(f"{student} {'' if parts else 'reaches '}{formats.nats(loss)}{unit}{behind}")
    return [f"{where} {formats.listed(parts)}."]


def _last_check(record: Record) -> str:
    steps = [series.step_S[-1] for m in record.models if len((series := record.column(f"heldout/{m}")).step_S)]
    return f"{max(steps):.0f}"


def _controls(record: Record) -> list[str]:
    losses = final_losses(record)
    teacher = losses.get("teacher")
    sentences = []
    for name, control in controls(record).items():
        if name not in losses:
            continue
        alone, distilled = control["heldout_nats"], losses[name]
        text = f"Trained alone on the same batches, {name} reached {formats.nats(alone)}: distilling "
        text += f"{'gained' if distilled < alone else 'cost'} {formats.nats(abs(alone - distilled))} nats"
        if teacher is not None and teacher < alone and distilled < alone:
            text += f", {(alone - distilled) / (alone - teacher):.0%} of the gap to the teacher".replace("%", " %")
        sentences.append(text + ".")
    return sentences


def _compression(record: Record) -> list[str]:
    """Each export against the student it was made from: how much smaller, how much worse."""
    students = {model_of(entry): entry for entry in record.entries if entry.get("role") == "student"}
    exports = [entry for entry in record.entries if entry.get("role") == "export" and model_of(entry) in students]
    parts = []
    for export in exports:
        student = students[model_of(export)]
        loss = formats.signed_nats(export["heldout_nats"] - student["heldout_nats"])
        smaller = student["bytes_on_disk"] / export["bytes_on_disk"]
        parts.append(
            f"{title(export)} is {smaller:.1f} times smaller ({formats.size(export['bytes_on_disk'])}) at {loss} nats"
        )
    return [f"Compressed, {formats.listed(parts)}."] if parts else []
