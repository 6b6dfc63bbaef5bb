"""What follows training, on rank 0: describe the models, compress the students, evaluate everything, write the report.

    compress_and_report(config, run_folder, tracker)

Each part is skipped when its result is there already, so a run killed here goes on from where it was.
"""

import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import evals
import quant
from distill import run_record
from distill.assembly import Assembly
from distill.target_cache import trained_as
from evals.footprint import count_parameters
from evals.result import summary
from herd import report
from herd.data.tokenizer import tokenizer_digest
from herd.llama4.source import is_spec
from herd.run import files
from herd.run.config_checks import export_name
from herd.run.lineage import model_card, read_lineage, write_lineage
from herd.run.schema import Config, Quantize
from herd.run.tracking import Tracker
from quant.calibration.draw import draw
from quant.exports import COVERAGE
from quant.gate_process import GateProcess
from quant.methods.names import reads_rows
from quant.options import read_choices
from teachers.cache.identity import LINEAGE_KEY

LICENCE = "apache-2.0"  # of models built from a spec; one that started from other weights keeps theirs


def describe_model(folder: Path, name: str, config: Config, parts: Assembly, tracker: Tracker) -> None:
    """Write lineage.json and the model card of a model that was just trained."""
    is_teacher = name == "teacher"
    role = "teacher" if is_teacher else "student"
    source = config.teacher.source if is_teacher else config.students[name].source
    run_folder = config.run.folder / config.run.name
    teachers = {name: route.source for name, route in config.teacher.routes.items()} or {"": config.teacher.source}
    facts = {
        "role": role,
        "name": name,
        "run_id": tracker.nested(name, role=role).run_id,
        "run_folder": str(run_folder),
        "teacher": None if is_teacher or config.teacher.mode == "none" else ", ".join(dict.fromkeys(teachers.values())),
        "data": config.data.origin,
        "sequence_length": config.data.sequence_length,
        "data_config": config.data.model_dump(mode="json"),
        "data_fingerprint": parts.corpus.fingerprint,
        "tokenizer_digest": tokenizer_digest(parts.tokenizer),
    }
    if config.data.sources:
        facts["data_fingerprints"] = {name: fingerprint for name, (_, fingerprint) in parts.origins(config).items()}
    if config.teacher.routes:
        facts["teachers"] = teachers
    if is_teacher and config.teacher.cache is not None:
        facts[LINEAGE_KEY] = trained_as(run_folder)
    lineage = write_lineage(folder, **facts)
    origin = {"licence": LICENCE} if is_spec(source) else {"base_model": source}
    # Counted in the files: under ZeRO-3 and expert parallelism a rank holds only parts of the parameters.
    model_card(folder, lineage | origin | {"architecture": source, "parameters": count_parameters(folder)})


def compress_and_report(config: Config, run_folder: Path, tracker: Tracker) -> None:
    """Quantise every student as configured, evaluate every model, write report.html, and tell MLflow all of it."""
    torch.set_num_threads(os.cpu_count() or 1)  # the other ranks are gone
    wanted = [(student, one) for student, facts in config.students.items() for one in facts.quantize]
    missing = any(not is_made(run_folder, student, one) for student, one in wanted)
    # Both processes import what they need while the exports are made.
    with evals.Probe() as probe, GateProcess() if missing else nullcontext() as gate:
        exports = {
            compress(config, run_folder, student, settings, tracker, gate): run_folder / "students" / student
            for student, settings in wanted
        }
        results = evaluate_all(config, run_folder, exports, probe)
    for result in results:
        register(result.entry(), config, tracker)
    print(f"\n{summary(results)}\n", flush=True)
    run_record.mark(run_folder, "finished")  # before the report, which shows it
    page = report.write(run_folder)
    for path in (page, *sorted((run_folder / "plots").glob("*.png"))):
        tracker.artifact(path, folder="report")
    tracker.artifact(run_folder / "evals.json")
    print(f"report: {page}", flush=True)


def recipe(run_folder: Path, settings: Quantize) -> dict[str, Any]:
    """What tells exports of one name apart: all settings, an allocation's content, when the student was trained."""
    facts = settings.model_dump(mode="json") | {"trained": run_record.read(run_folder)["trained"]}
    return facts if settings.allocation is None else facts | {"allocation": files.sha256(settings.allocation)}


def is_made(run_folder: Path, student: str, settings: Quantize) -> bool:
    """Whether that export is there and whole, made by these settings of this student."""
    made = run_folder / "exports" / export_name(student, settings)
    return made.exists() and read_lineage(made).get("recipe") == recipe(run_folder, settings)


def compress(
    config: Config, run_folder: Path, student: str, settings: Quantize, tracker: Tracker, gate: GateProcess | None
) -> Path:
    """Make one export, which takes a gate, unless a whole one of these very settings is there; returns its folder."""
    name = export_name(student, settings)
    folder = run_folder / "exports" / name
    if not is_made(run_folder, student, settings):
        if folder.exists():
            print(f"{name}: its settings or its student changed, so it is made again")
            trash = folder.with_name(f".{name}.trash")
            shutil.rmtree(trash, ignore_errors=True)  # of a run killed just here
            shutil.rmtree(folder.rename(trash))
        source = run_folder / "students" / student
        calibration = None
        choices = None if settings.allocation is None else read_choices(settings.allocation)
        if reads_rows(settings.method, settings.scheme):
            calibration = draw(settings.calibration, config.data, source, out=folder)
        quantized = quant.quantize(
            source,
            scheme=settings.scheme,
            allocation=choices,
            group_size=settings.group_size,
            container=settings.container,
            method=settings.method,
            calibration=calibration,
        )
        child = tracker.nested(name, role="export", params=settings.model_dump(mode="json"))
        if settings.allocation is not None:
            child.artifact(settings.allocation)
        tracker.flush(5)  # so that the export knows its run
        lineage = read_lineage(source) | {"role": "export", "name": name, "student": student, "run_id": child.run_id}
        lineage |= {"recipe": recipe(run_folder, settings)}
        if calibration is not None:
            rows = calibration.rows
            child.dataset("calibration rows", rows.source, rows.fingerprint, "calibration")
        quant.export(quantized, folder, lineage=lineage, gate=gate)
        if (folder / COVERAGE).is_file():
            summary = json.loads((folder / COVERAGE).read_text())["summary"]
            child.metrics({f"calibration/{key}": float(value) for key, value in summary.items()}, step=config.run.steps)
        print(f"{name}: exported and checked, {folder}")
    return folder


def evaluate_all(config: Config, run_folder: Path, exports: dict[Path, Path], probe: evals.Probe) -> list[evals.Result]:
    """Score teacher, students (against the teacher) and exports (against their student) on the same held-out rows.

    A teacher with a tokenizer of its own is scored on rows of its own, and bits per byte compare it with the students.
    """
    teacher = teacher_folder(config, run_folder)
    students = [run_folder / "students" / name for name in config.students]
    settings = {
        "rows": evals.rows_from(config.data, students[0], rows=config.data.heldout_rows),
        "decode_tokens": config.evaluation.decode_tokens,
        "probe": probe,
    }
    results = []
    reference = None
    if teacher is not None and config.loss.cross_tokenizer is not None:
        own = evals.rows_from(config.data, teacher, rows=config.data.heldout_rows)
        results.append(evals.evaluate(teacher, **settings | {"rows": own}))
    elif teacher is not None:
        results.append(evals.evaluate(teacher, **settings))
        reference = evals.load(teacher)
    results += routed_teachers(config, settings)
    results += [evals.evaluate(student, against=reference, **settings) for student in students]
    for student in students:
        made = [export for export, source in exports.items() if source == student]
        reference = evals.load(student) if made else None
        results += [evals.evaluate(export, against=reference, **settings) for export in made]
    evals.add_entries(run_folder / "evals.json", [result.entry() for result in results])
    return results


def routed_teachers(config: Config, settings: dict) -> list[evals.Result]:
    """Every frozen teacher of a route that is a folder, each scored on the held-out rows of its own source."""
    results = []
    for name, route in config.teacher.routes.items():
        folder = Path(route.source)
        if config.teacher.mode == "frozen" and folder.is_dir():
            own = evals.rows_from(config.data.alone(name), folder, rows=config.data.heldout_rows)
            result = evals.evaluate(folder, **settings | {"rows": own})
            results.append(replace(result, name=f"teacher-{name}", role=None, student=None))
    return results


def teacher_folder(config: Config, run_folder: Path) -> Path | None:
    """The folder of the run's teacher: the one it trained, or the frozen one it read, when that is a folder."""
    if config.teacher.routes:
        return None
    if config.teacher.mode == "codistill":
        return run_folder / "teacher"
    frozen = Path(config.teacher.source)
    return frozen if config.teacher.mode == "frozen" and frozen.is_dir() else None


def register(entry: dict, config: Config, tracker: Tracker) -> None:
    """Put one model and its measurements into MLflow, with an alias that names the run."""
    name, role = entry["name"], entry["role"]
    numbers = {key: value for key, value in entry.items() if isinstance(value, int | float) and key != "rows"}
    child = tracker.nested(name, role=role)
    child.metrics({f"eval/{key}": value for key, value in numbers.items()}, step=config.run.steps)
    alias = config.run.name if config.tracking.register_models else None
    child.model(f"{config.tracking.experiment}-{name}", Path(entry["path"]), role=role, alias=alias, metrics=numbers)
