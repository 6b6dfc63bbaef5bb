"""What a study's YAML may say, and what is refused before anything runs."""

import re
import sys
from pathlib import Path

import pytest

from herd.run.errors import ConfigError, EnvironmentFault
from sweeps import checks, settings, spaces
from sweeps.transfer import settings as transfer
from tests.sweeps import studies

SHIPPED = sorted((studies.ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_study_fits_its_configuration(path, monkeypatch):
    monkeypatch.chdir(studies.ROOT)
    assert checks.check(settings.load(path)).students


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
        ("space: {optim.lr: {choices: [1e-3]}}", "of length 2 or more"),
        ("space: {}", "space: no path in it"),
        ("space: {optim.lr: {}}", "optim.lr = {}: write {low: NUMBER, high: NUMBER} or {choices: [ONE, OTHER]}"),
        ("space: {optim.lr: {low: 1e-3, high: 1e-3}}", "low and high are both 0.001; make high larger"),
        ("space: {optim.lr: {low: abc, high: 1}}", "space.optim.lr.low = abc: must be a number"),
        ("space: {optim.lr: {low: false, high: 1}}", "false is no number; use choices"),
        ("space: {optim.lr: {choices: [1e-3, 2e-3, 1e-3]}}", "0.001 is there 2 times; give every choice once"),
        (
            "space: {optim.lr: {low: 1e-3, high: 2e-3}, optim: {choices: [{lr: 1}, {lr: 2}]}}",
            "space.optim.lr lies in space.optim, which is drawn as well",
        ),
        ("space: {optim.lr: {low: 1e-3, high: 2e-3}}\nrepeats: {seeds: 1}", "1 pair has no interval; use 2 or more"),
        ("space: {optim.lr: {low: 1e-3, high: 2e-3}}\nbudget: {trials: 1e30}", "must be a whole number"),
        ("space: {optim.lr: {low: 1e-3, high: 2e-3}}\nstorage: 'sqlite:///'", "sqlite:/// is no storage; use"),
        (
            "space: {optim.lr: {low: 1e-3, high: 2e-3}}\nstorage: 'sqlite:///:memory:'",
            "is no storage; use sqlite:///FILE",
        ),
        ("space: {run.seed: {low: 0, high: 9}}", "space.run.seed is set by the study itself"),
        (
            "space: {optim.lr: {low: 1e-3, high: 2e-3}}\nset: [run.seed=5]",
            "set: run.seed is set by the study itself, for every trial; use the study's own seed:",
        ),
        ("space: {optim.lr: {low: 1e-3, high: 2e-3}}\nfolder: 'a?b'", "folder = a?b: SQLite takes what follows a ?"),
        (f"space: {{optim.lr: {{low: 1e-3, high: 2e-3}}}}\nname: {'n' * 300}", "name is 300 letters long"),
        ("space: {batch.rows: {low: 2, high: 8, step: 7}}", "step = 7 leads beyond high = 8 at once; use 6 or less"),
        ("space: {batch.rows: {low: 2, high: 8, step: 0.5}}", "write low and high with a point, or a whole step"),
        ("space: {optim.lr: {low: 1e-3, high: 2e-3}}\nstorage: foo://x", "foo://x is no storage; use sqlite:///FILE"),
        ("space: {optim.lr: {low: 1e-3, high: 2e-3}}\nstorage: 'grpc://u:secret@host'", "storage: grpc://host is no"),
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
        checks.check(study)


def test_a_range_ends_on_its_last_step(tmp_path):
    ranges = "{batch.rows: {low: 64, high: 500, step: 128}, optim.clip: {low: 0.1, high: 1.05, step: 0.1}}"
    study = settings.load(write(tmp_path, f"space: {ranges}"))
    assert [part.last for part in study.space.values()] == [448, 1.0]
    assert [found.high for found in spaces.distributions(study.space).values()] == [448, 1.0]


@pytest.mark.parametrize(
    ("changes", "error", "fault"),
    [
        (["objectives=[{metric: helout/scout}]"], ConfigError, "metric = helout/scout: no run of .* use heldout/scout"),
        (["objectives=[{metric: heldout/tiny}]"], ConfigError, "reports it; use heldout/scout, heldout/maverick"),
        (["objectives=[{metric: evals/scout-int5/kl_mean}]"], ConfigError, "use evals/scout-int4/kl_mean"),
        (["objectives=[{metric: evals/scout/path}]"], ConfigError, "no run of .* reports it"),
        (["set=[run.evaluate_every=0]"], ConfigError, "never measured: run.evaluate_every = 0"),
        (
            ["objectives=[{metric: evals/scout/parameters}]", "set=[run.ends=trained]"],
            ConfigError,
            "never measured: run.ends = trained",
        ),
        (["launch.ranks=3"], ConfigError, "launch.ranks = 3: batch.rows = 4: .* does not hold on 3 ranks"),
        (["pruner.kind=median", "set=[run.evaluate_every=500]"], ConfigError, "run.evaluate_every = 500 leaves none"),
        (["launch.program=[no-such-program]"], ConfigError, "launch.program.0 = no-such-program: no such program"),
        (["launch.program=[python, -u, no-such.py]"], ConfigError, "launch.program.2 = no-such.py: no such file"),
        (["storage=mysql+foo://user:secret@host/x"], ConfigError, "storage = mysql.foo://host/x: .* no driver foo"),
        (["base=nowhere.yaml"], ConfigError, "nowhere.yaml: no such file; base takes"),
        (["folder=FILE"], ConfigError, "folder: .*study.yaml is a file, not a folder"),
        (["storage=journal:FILE/x"], ConfigError, "storage: .*study.yaml is a file, not a folder"),
    ],
)
def test_what_no_run_can_give_is_refused_before_one_starts(tmp_path, changes, error, fault):
    path = write(tmp_path, "space: {optim.lr: {low: 1e-3, high: 2e-3}}")
    study = settings.load(path, [change.replace("FILE", str(path)) for change in changes])
    with pytest.raises(error, match=fault) as raised:
        checks.check(study)
    assert "secret" not in str(raised.value)


def test_a_storage_whose_driver_is_not_installed_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    study = settings.load(write(tmp_path, "space: {optim.lr: {low: 1e-3, high: 2e-3}}\nstorage: postgresql://h/x"))
    with pytest.raises(EnvironmentFault, match=r"pip install 'psycopg\[binary\]'"):
        checks.check(study)


def test_a_program_of_its_own_reports_what_it_likes(tmp_path):
    changes = ["objectives=[{metric: heldout/mine}]", f"launch.program=[{sys.executable}]"]
    assert checks.check(settings.load(write(tmp_path, "space: {optim.lr: {low: 1e-3, high: 2e-3}}"), changes)).students


@pytest.mark.parametrize(
    ("load", "file", "mend"),
    [
        (settings.load, "configs/sweeps/transfer/smoke.yaml", "use python -m sweeps transfer --config"),
        (settings.load, "configs/smoke.yaml", "the configuration of a run, no study"),
        (transfer.load, "configs/sweeps/rates.yaml", "use python -m sweeps --study"),
        (transfer.load, "configs/smoke.yaml", "the configuration of a run, no transfer check"),
    ],
)
def test_another_kind_of_file_is_named_with_its_command(load, file, mend):
    with pytest.raises(ConfigError, match=mend) as raised:
        load(studies.ROOT / file)
    assert "\n" not in str(raised.value)


def test_a_file_whose_name_is_none_is_asked_for_one(tmp_path):
    path = tmp_path / "my study.yaml"
    path.write_text(f"base: {studies.ROOT}/configs/smoke.yaml\nspace: {{optim.lr: {{low: 1e-3, high: 2e-3}}}}\n"
                    "objectives: [{metric: heldout/scout}]\n")  # fmt: skip
    with pytest.raises(ConfigError, match=r"name: missing; give a value \(.* letters, digits and \. _ -"):
        settings.load(path)
    assert settings.load(path, ["name=mine"]).name == "mine"


def test_a_flag_that_is_no_yaml_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"--set space=\[: no YAML"):
        settings.load(write(tmp_path, "space: {optim.lr: {low: 1e-3, high: 2e-3}}"), ["space=["])


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
    assert spaces.defaults(checks.check(study), study.space) == {"loss.weighting": "{kind: maturity}", "batch.rows": 4}


def test_defaults_outside_the_space_are_no_trial(tmp_path):
    study = settings.load(write(tmp_path, "space: {optim.lr: {low: 1e-2, high: 2e-2}}"))
    assert spaces.defaults(checks.check(study), study.space) is None


def test_a_grid_has_every_point_once_as_it_is_written(tmp_path):
    ranges = "{batch.rows: {low: 2, high: 6, step: 2}, optim.clip: {low: 0.1, high: 0.3, step: 0.1}}"
    text = f"space: {ranges}\nsampler: {{kind: grid}}"
    study = settings.load(write(tmp_path, text))
    assert spaces.grid(study.space) == {"batch.rows": [2, 4, 6], "optim.clip": [0.1, 0.2, 0.3]}
    assert study.trials == 9
