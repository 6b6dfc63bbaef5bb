"""Logs a model to MLflow by reference: a logged model with metrics, a registered version and an alias, no weights.

    log_model(client, record, event, run_id=..., experiment_id=...)        # called by the sender only

The logged model's artifact is a handful of small files; its tag `path` says where the weights are.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from herd.run.tracking_record import Record

SMALL_FILES = ("README.md", "lineage.json", "config.json", "generation_config.json")
LINEAGE_TAGS = ("teacher", "student", "data_fingerprint", "tokenizer_digest", "git_commit")


def log_model(client: Any, record: Record, event: dict[str, Any], *, run_id: str, experiment_id: str) -> None:
    """Log and register the model folder that `event` names. Repeating an event changes nothing."""
    from mlflow.entities import LoggedModelInput, LoggedModelOutput, Metric

    lineage = event["lineage"]
    tags = event["tags"] | {key: lineage[key] for key in LINEAGE_TAGS if lineage.get(key)}
    tags |= {"role": event["role"], "path": event["path"], "herd.event": event["id"]}
    tags = {key: str(value) for key, value in tags.items()}

    found = client.search_logged_models([experiment_id], filter_string=f"tags.`herd.event` = '{event['id']}'")
    model = found[0] if found else client.create_logged_model(
        experiment_id, name=_safe(event["name"], '/:.%"\''), source_run_id=run_id, tags=tags, model_type=event["role"]
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="herd-model-") as folder:
        _gather(Path(folder), event, model)
        client.log_model_artifacts(model.model_id, folder)
    metrics = [Metric(k, v, event["time"], 0, model_id=model.model_id) for k, v in event["metrics"].items()]
    if metrics:
        client.log_batch(run_id, metrics=metrics, synchronous=True)
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    if maker := _maker(client, record, event):
        client.log_inputs(run_id, models=[LoggedModelInput(maker)])
    if event["alias"]:
        _register(client, event, model, tags, run_id)
    # By the name that lineage uses: the one in MLflow may carry a prefix.
    record.models[f"{event['role']}/{lineage.get('name') or event['name']}"] = model.model_id
    record.save()


def _maker(client: Any, record: Record, event: dict[str, Any]) -> str | None:
    """Id of the model that this one was made from: an export's student, a student's teacher.

    A run has one teacher, so its lineage may name it by its source (`behemoth-nano`) as well as by its name.
    """
    from mlflow.exceptions import MlflowException

    role, lineage = event["role"], event["lineage"]
    if event.get("made_from"):
        try:
            made = client.get_run(event["made_from"]).outputs.model_outputs
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # its run is in another store
                raise
            return None
        return made[-1].model_id if made else None
    if role == "export":
        return record.models.get(f"student/{lineage.get('student')}")
    teachers = [model for key, model in record.models.items() if key.startswith("teacher/")]
    return teachers[0] if role == "student" and lineage.get("teacher") and len(teachers) == 1 else None


def _register(client: Any, event: dict[str, Any], model: Any, tags: dict[str, str], run_id: str) -> None:
    from mlflow.exceptions import MlflowException

    name = _safe(event["name"], "/:'")
    try:
        client.create_registered_model(name, tags={"role": event["role"]})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = client.search_model_versions(f"name = '{name}' and tags.`herd.event` = '{event['id']}'")
    version = found[0] if found else client.create_model_version(
        name,
        # A server accepts a local source only inside the logged model's own artifacts.
        source=model.artifact_location,
        run_id=run_id,
        model_id=model.model_id,
        tags=tags,
        description=f"Weights: {event['path']}",
        await_creation_for=0,
    )  # fmt: skip
    # The tag by which MLflow's own `register_model` ties the two: the UI shows the version on the logged model.
    listed = json.dumps([{"name": name, "version": str(version.version)}])
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": listed})
    client.set_registered_model_alias(name, event["alias"], str(version.version))


def _gather(folder: Path, event: dict[str, Any], model: Any) -> None:
    """Small files of the model folder, and an `MLmodel` that points to it."""
    for name in SMALL_FILES:
        if (source := Path(event["path"]) / name).exists():
            shutil.copy(source, folder / name)
    content = {
        "artifact_path": model.artifact_location,
        "flavors": {"herd": {"path": event["path"], "role": event["role"]}},
        "model_id": model.model_id,
        "run_id": model.source_run_id,
    }
    (folder / "MLmodel").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")  # JSON is YAML


def _safe(name: str, forbidden: str) -> str:
    return "".join("-" if character in forbidden else character for character in name)
