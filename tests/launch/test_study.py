"""A study whose trial is a real run through the DeepSpeed launcher, tracked in a real MLflow store."""

import mlflow
import pytest

import sweeps
from sweeps import Choices, Objective, Study
from tests.sweeps.studies import ROOT

SIZES = "hidden_size: 64, intermediate_size: 64, intermediate_size_mlp: 128, num_local_experts: 4"
STUDENT = f"{{source: scout-nano, overrides: {{{SIZES}}}}}"


@pytest.mark.timeout(600)
def test_a_trial_is_a_launcher_run_below_the_study_in_mlflow(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    study = Study(
        name="real",
        folder=tmp_path,
        base=ROOT / "configs" / "smoke.yaml",
        set=[f"students={{scout: {STUDENT}}}", "teacher.mode=none", "teacher.head_start=0", "run.steps=2",
             "run.evaluate_every=1", "evaluation.decode_tokens=0"],
        space={"optim.lr": Choices(choices=[4e-3, 1e-3])},
        objectives=[Objective(metric="heldout/scout")],
        budget={"trials": 1},
    )  # fmt: skip
    (trial,) = sweeps.run(study).trials
    assert trial.state == "complete" and trial.defaults and 3 < trial.values[0] < 8
    client = mlflow.MlflowClient()
    run = client.get_run(trial.mlflow_run_id)
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert run.data.tags["sweep.trial"] == "0" and parent.info.run_name == "real"
    assert parent.data.metrics["best/heldout/scout"] == pytest.approx(trial.values[0])
    version = client.get_model_version_by_alias("real-scout", "real-best")
    assert version.description == f"Weights: {trial.folder / 'students' / 'scout'}"
