"""What a study's YAML may say, and what is refused before anything runs."""

import re
from pathlib import Path

import pytest

from herd.run.errors import ConfigError
from sweeps import settings, spaces
from tests.sweeps import studies

SHIPPED = sorted((studies.ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_study_fits_its_configuration(path, monkeypatch):
    monkeypatch.chdir(studies.ROOT)
    assert spaces.check(settings.load(path)).students


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(f"base: {studies.ROOT / 'configs' / 'smoke.yaml'}\nobjectives: [{{metric: heldout/scout}}]\n{text}")
    return path


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("space: {optim.lr: {low: 2e-3, high: 1e-3}}", "low = 0.002 must be below high = 0.001"),
        ("space: {optim.lr: {low: 0.0, high: 1e-3, log: true}}", "low = 0.0 has no logarithm"),
        ("space: {optim.lr: {low: 1e-3, high: 2e-3, logg: true}}", "lr.logg: unknown; did you mean"),
        ("space: {optim.lr: {low: 1e-3, high: 2e-3}}\nbugdet: {trials: 3}", "bugdet: unknown; did you mean budget?"),
        ("space: {optim.lr: {choices: [1e-3]}}", "at least 2"),
        ("space: {}", "at least 1"),
        ("space: {optim.lr: {low: 1e-3, high: 2e-3}}\npruner: {kind: wilcoxon}", "seeds = 1; use 3 or more"),
        ("space: {optim.lr: {low: 1e-3, high: 2e-3}}\npruner: {kind: median}\nseeds: 2", "looks at one run"),
        ("space: {optim.lr: {low: 1e-3, high: 2e-3}}\nsampler: {kind: grid}", "grid needs choices, or a step"),
        ("space: {loss.temperature: {choices: [1, 2]}}\nsampler: {kind: cmaes}", "cmaes takes ranges only"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused_with_the_reason(tmp_path, text, fault):
    with pytest.raises(ConfigError, match=re.escape(fault)):
        settings.load(write(tmp_path, text))


@pytest.mark.parametrize(
    ("path", "part", "fault"),
    [
        ("optim.lrr", "{low: 1e-3, high: 2e-3}", "space.optim.lrr: optim.lrr: unknown; did you mean optim.lr?"),
        ("loss.temperature", "{low: -1.0, high: 2.0}", "space.loss.temperature: loss.temperature = -1.0"),
        ("loss.weighting", "{choices: [{kind: lead}, {kind: led}]}", "space.loss.weighting: loss.weighting.kind"),
    ],
)
def test_a_space_beyond_the_configuration_names_the_path_and_the_nearest(tmp_path, path, part, fault):
    study = settings.load(write(tmp_path, f"space: {{{path}: {part}}}"))
    with pytest.raises(ConfigError, match=re.escape(fault)):
        spaces.check(study)


def test_flags_override_the_file(tmp_path):
    path = write(tmp_path, "space: {optim.lr: {low: 1e-3, high: 2e-3}}\nbudget: {trials: 3}")
    assert settings.load(path, ["budget.trials=7", "sampler.kind=random"]).budget.trials == 7
    assert settings.load(path).name == "study"


def test_flags_reach_into_the_space_whose_keys_have_dots(tmp_path):
    path = write(tmp_path, "space: {optim.lr: {low: 1e-3, high: 2e-3}}")
    space = settings.load(path, ["space.optim.lr.high=4e-3", "space.optim.clip={choices: [0.5, 1.0]}"]).space
    assert space["optim.lr"].high == 4e-3
    assert space["optim.clip"].choices == [0.5, 1.0]


def test_the_defaults_are_found_in_the_space_by_what_a_choice_says(tmp_path):
    weights = "{choices: [{kind: constant, alpha: 0.5}, {kind: maturity}]}"
    text = f"space: {{loss.weighting: {weights}, batch.rows: {{low: 2, high: 8}}}}"
    study = settings.load(write(tmp_path, text))
    assert spaces.defaults(spaces.check(study), study.space) == {"loss.weighting": "{kind: maturity}", "batch.rows": 4}


def test_defaults_outside_the_space_are_no_trial(tmp_path):
    study = settings.load(write(tmp_path, "space: {optim.lr: {low: 1e-2, high: 2e-2}}"))
    assert spaces.defaults(spaces.check(study), study.space) is None


def test_a_grid_has_every_point_once(tmp_path):
    ranges = "{batch.rows: {low: 2, high: 6, step: 2}, optim.clip: {low: 0.5, high: 1.0, step: 0.25}}"
    text = f"space: {ranges}\nsampler: {{kind: grid}}"
    study = settings.load(write(tmp_path, text))
    assert spaces.grid(study.space) == {"batch.rows": [2, 4, 6], "optim.clip": [0.5, 0.75, 1.0]}
