"""The whole path through the launcher: train, write models, compress, evaluate, report, track. One run, many looks.

pytest tests/launch/test_whole_path.py
"""

import json
from datetime import UTC, datetime

import pytest
import torch
from mlflow.tracking import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from herd.run.lineage import read_lineage
from tests.launch.launcher import finish_ranks, launch, start_ranks

pytestmark = pytest.mark.timeout(900)  # a busy machine is not a failure
BITS = {"*": "int8", "*.experts": "int4-g32"}
MIXED = "students.maverick.quantize=[fp8, {{allocation: {}/bits.json}}]"
EXPORTS = {"scout-int4": "scout", "maverick-fp8": "maverick", "maverick-mixed-bits": "maverick"}


@pytest.fixture(scope="module")
def herd(tmp_path_factory):
    """configs/smoke.yaml on two ranks, ended when trained, then reported; one more export, a store of its own."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "bits.json").write_text(json.dumps(BITS))
    trained = launch(folder, train_only=False, overrides=[MIXED.format(folder), "run.ends=trained"])
    assert trained.code == 0, trained.log
    assert (trained.folder / "students" / "scout").is_dir()
    assert not list(trained.folder.glob("exports")) + list(trained.folder.glob("*.html"))
    run = launch(folder, train_only=False, overrides=[MIXED.format(folder)], resume="auto")
    assert run.code == 0, run.log
    return run


def test_every_model_folder_loads_and_knows_where_it_came_from(herd):
    for name in ("teacher", "students/scout", "students/maverick"):
        model, info = AutoModelForCausalLM.from_pretrained(herd.folder / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        tokenizer = AutoTokenizer.from_pretrained(herd.folder / name)
        logits = model(torch.tensor([tokenizer.encode("def add(a, b):")])).logits
        assert torch.isfinite(logits).all()
        assert read_lineage(herd.folder / name)["data_fingerprint"]
        assert (herd.folder / name / "README.md").read_text().startswith("---")


def test_exports_are_gated_and_smaller_than_their_students(herd):
    for name, student in EXPORTS.items():
        export = herd.folder / "exports" / name
        assert read_lineage(export)["student"] == student
        weights = sum(file.stat().st_size for file in export.glob("*.safetensors"))
        assert weights < sum(file.stat().st_size for file in (herd.folder / "students" / student).glob("*.safetensors"))


def test_everything_is_evaluated_on_the_same_rows(herd):
    entries = json.loads((herd.folder / "evals.json").read_text())["entries"]
    assert [entry["name"] for entry in entries] == ["teacher", "scout", "maverick", *EXPORTS]
    assert len({entry["tokens"] for entry in entries}) == 1
    by_name = {entry["name"]: entry for entry in entries}
    assert by_name["scout"]["reference"] == "teacher" and by_name["scout-int4"]["reference"] == "scout"
    last = herd.metrics()[-1]
    for name in ("teacher", "scout", "maverick"):
        assert by_name[name]["heldout_nats"] == pytest.approx(last[f"heldout/{name}"], rel=2e-2)
    assert 0 < by_name["scout-int4"]["kl_mean"] < 0.1


def test_the_report_is_self_contained(herd):
    page = (herd.folder / "report.html").read_text()
    assert "scout-int4" in page and 'src="http' not in page and "<link" not in page
    assert len(list((herd.folder / "plots").glob("*.png"))) >= 5


def test_the_run_is_finished_after_its_evaluation_and_the_report_says_when(herd):
    record = json.loads((herd.folder / "run.json").read_text())
    evaluated = datetime.fromtimestamp((herd.folder / "evals.json").stat().st_mtime, UTC).isoformat(timespec="seconds")
    assert record["started"] < record["trained"] < evaluated <= record["finished"]
    assert f"<dt>finished</dt><dd>{record['finished']}</dd>" in (herd.folder / "report.html").read_text()


def test_mlflow_holds_the_run_tree_and_the_registered_models(herd):
    client = MlflowClient(f"sqlite:///{herd.folder.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("herd")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"run", "teacher", "scout", "maverick", *EXPORTS}
    mixed = runs["maverick-mixed-bits"]
    assert mixed.data.metrics["eval/kl_mean"] > 0
    assert "bits.json" in {file.path for file in client.list_artifacts(mixed.info.run_id)}
    parent = runs.pop("run")
    assert parent.info.status == "FINISHED" and parent.data.params["run.steps"] == "12"
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    curve = client.get_metric_history(runs["scout"].info.run_id, "train/ce")
    assert len({point.step for point in curve}) == 12
    assert {model.name for model in client.search_registered_models()} >= {"herd-teacher", "herd-scout-int4"}


def test_an_identical_second_start_does_nothing_twice(herd):
    program, overrides = ["-m", "distill"], [MIXED.format(herd.folder.parent)]
    ranks = start_ranks(herd.folder.parent, program, ranks=2, overrides=overrides, resume="auto")
    again = finish_ranks(ranks, herd.folder.parent)
    assert "exported and checked" not in again.log
    assert len(again.metrics()) == 16
