"""A study whose trials are real runs through the DeepSpeed launcher, tracked in a real MLflow store."""

import subprocess
import sys
import time
import urllib.error
import urllib.request

import mlflow
import pytest

import sweeps
from herd.run.ranks import free_port
from sweeps import Choices, Objective, Study
from tests.sweeps.studies import ROOT

SIZES = "hidden_size: 64, intermediate_size: 64, intermediate_size_mlp: 128, num_local_experts: 4"
STUDENT = f"{{source: scout-nano, overrides: {{{SIZES}}}}}"
STARTS_S = 60


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """A study of one trial, and its result."""
    study = Study(
        name="real",
        folder=tmp_path_factory.mktemp("runs"),
        base=ROOT / "configs" / "smoke.yaml",
        set=[f"students={{scout: {STUDENT}}}", "teacher.mode=none", "teacher.head_start=0", "run.steps=2",
             "run.evaluate_every=1", "evaluation.decode_tokens=0"],
        space={"optim.lr": Choices(choices=[4e-3, 1e-3])},
        objectives=[Objective(metric="heldout/scout")],
        budget={"trials": 1},
    )  # fmt: skip
    return sweeps.run(study)


@pytest.mark.timeout(600)
def test_a_trial_is_a_launcher_run_below_the_study_in_mlflow(finished, store):
    (trial,) = finished.trials
    assert trial.state == "complete" and trial.defaults and 3 < trial.values[0] < 8
    assert not (trial.folder / "evals.json").exists()  # nothing asks for it
    client = mlflow.MlflowClient(store)
    run = client.get_run(trial.mlflow_run_id)
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert run.data.tags["sweep.trial"] == "0" and parent.info.run_name == "real"
    assert parent.data.metrics["best/heldout/scout"] == pytest.approx(trial.values[0])
    version = client.get_model_version_by_alias("real-scout", "real-best")
    assert version.description == f"Weights: {trial.folder / 'students' / 'scout'}"


@pytest.fixture
def address(finished, store):
    """Where MLflow's own page over the study's store is served."""
    port = free_port()
    command = [sys.executable, "-m", "herd.run.ui", "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + STARTS_S
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(30)


@pytest.mark.browser
@pytest.mark.timeout(600)
def test_mlflows_page_shows_the_study_with_its_trials_below_it_and_its_charts(finished, store, address, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--window-size=1600,1000"):
        options.add_argument(word)
    client = mlflow.MlflowClient(store)
    trial = client.get_run(finished.trials[0].mlflow_run_id)
    experiment, parent = trial.info.experiment_id, trial.data.tags["mlflow.parentRunId"]
    with webdriver.Chrome(options=options) as page:

        def wait(xpath):
            return WebDriverWait(page, STARTS_S).until(lambda page: page.find_element(By.XPATH, xpath))

        page.get(f"{address}/#/experiments/{experiment}/runs?workflowType=machine_learning")
        row = "//div[@role='row'][.//a[normalize-space()='real']]"
        wait(row)
        assert not page.find_elements(By.XPATH, "//a[normalize-space()='trial-0000']")
        wait(f"{row}//button").click()
        wait("//a[normalize-space()='trial-0000']")
        page.save_screenshot(str(tmp_path / "tree.png"))
        page.get(f"{address}/#/experiments/{experiment}/runs/{trial.info.run_id}")
        wait(f"//a[contains(@href, '{parent}')]")
        page.get(f"{address}/#/experiments/{experiment}/runs/{trial.info.run_id}/model-metrics")
        wait("//*[contains(@class, 'plot')]//*[name()='svg']")
        wait("//*[contains(text(), 'trial-0000 (time/')]")
        page.save_screenshot(str(tmp_path / "charts.png"))
        page.get(f"{address}/#/experiments/{experiment}/runs/{parent}/artifacts")
        wait("//*[contains(text(), 'report')]")
        page.save_screenshot(str(tmp_path / "artifacts.png"))
