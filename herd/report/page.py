"""Puts record, plots, tables and words together: plots/*.png and one self-contained report.html.

path = write_page(record)
"""

import shlex
from pathlib import Path
from typing import Any

from herd.report import formats
from herd.report.pictures import Picture, fill_template, make_picture
from herd.report.plots import alpha, experts, losses, quality, throughput
from herd.report.record import Record
from herd.report.style import NARROW, WIDE, colours
from herd.report.summary import controls, evaluated_text, final_losses, finished, summarise
from herd.report.tables import result_tables
from herd.run.files import write_atomic

TEMPLATE = "report.html.j2"


def write_page(record: Record) -> Path:
    """Write the plots and the page into the run's folder, each file atomically; returns the page's path."""
    pictures = draw_pictures(record, record.folder / "plots")
    path = record.folder / "report.html"
    write_atomic(path, render(record, pictures))
    return path


def draw_pictures(record: Record, folder: Path) -> dict[str, Picture]:
    """Plot name -> picture, for the plots this run has data for; the wide ones are also files in `folder`."""
    running = losses.window(record)
    averaged = f"running mean over {running} logged steps" if running > 1 else "as logged"
    plots = {
        "quality": (
            quality.draw,
            "Quality against size",
            "Every artefact by the size of its weight files; lines are 95 % intervals over held-out documents. "
            "Nothing lies below and left of the dashed line.",
        ),
        "losses": (losses.draw, "Losses", f"Points: held-out text. Pale lines: training batches, {averaged}."),
        "alpha": (
            alpha.draw,
            "Weight of the soft target",
            "Shade: share of tokens at that weight (1 = only the teacher is listened to). Line: mean over tokens. "
            "Below: by how many nats the teacher leads.",
        ),
        "experts": (
            experts.draw,
            "Expert load",
            "Tokens each expert received in the last tenth of the run, against an even share; one column an expert. "
            "A cross marks an expert that received none.",
        ),
        "throughput": (throughput.draw, "Speed", f"Left: all ranks together, {averaged}. Right: medians over the run."),
    }
    pictures = {}
    for name, (draw, heading, caption) in plots.items():
        wide = draw(record, WIDE)
        if wide is None:
            continue
        pictures[name] = make_picture(heading, caption, wide, draw(record, NARROW), folder / f"{name}.png")
    return pictures


def render(record: Record, pictures: dict[str, Picture]) -> str:
    """The page as HTML with nothing outside it."""
    return fill_template(
        "herd.report",
        TEMPLATE,
        record=record,
        finished=finished(record),
        started=record.facts.get("started"),
        summary=summarise(record),
        headline=_headline(record),
        tables=result_tables(record),
        scope=evaluated_text(record),
        pictures=pictures,
        commands=[_command(command) for command in record.facts.get("commands", [])],
        environment=_environment(record),
        problems=record.problems,
    )


def _headline(record: Record) -> list[dict[str, Any]]:
    """One tile a model: its colour, its final loss, how far it is behind the teacher or ahead of its control."""
    final, alone, palette = final_losses(record), controls(record), colours(record.models)
    tiles = []
    for model, loss in sorted(final.items(), key=lambda item: record.models.index(item[0])):
        notes = []
        if model != "teacher" and "teacher" in final:
            notes.append(f"{formats.signed_nats(loss - final['teacher'])} from the teacher")
        if model in alone:
            notes.append(f"{formats.signed_nats(loss - alone[model]['heldout_nats'])} from training alone")
        tiles.append({"model": model, "loss": formats.nats(loss), "notes": notes, "colour": palette[model]})
    return tiles


def _command(command: str | list[str]) -> str:
    return command if isinstance(command, str) else shlex.join(command)


def _environment(record: Record) -> list[tuple[str, str]]:
    """Name and value of what surrounded the run."""
    facts: dict[str, Any] = {
        "started": record.facts.get("started"),
        "trained": record.facts.get("trained"),
        "finished": record.facts.get("finished"),
        "ranks": record.facts.get("world_size"),
        "git commit": record.facts.get("git_commit"),
        "MLflow experiment": record.mlflow.get("experiment"),
        **{f"MLflow run of {key}": run for key, run in record.mlflow.get("runs", {}).items()},
        **record.facts.get("versions", {}),
    }
    return [(name, str(value)) for name, value in facts.items() if value is not None]
