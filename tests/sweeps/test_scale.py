"""A study's best, carried to a large configuration: what is written is valid, and its rules are those of the models."""

import json

import pytest
from optuna.trial import create_trial

from distill.transferred import transferred_of
from herd.llama4.specs import SPECS
from herd.llama4.transfer import Horizon, scales
from herd.run import config, config_text
from herd.run.errors import ConfigError
from sweeps import Objective, annotated, scale, scaling, storages
from sweeps import __main__ as command
from sweeps.ranges import Choices, Range
from tests.sweeps import studies

BIG = studies.ROOT / "configs" / "maverick.yaml"
FOUND = ["optim.lr=0.003", "optim.weight_decay=0.03", "loss.temperature=1.5", "batch.rows=4"]
SPACE = {
    "optim.lr": Range(low=1e-4, high=1e-1, log=True),
    "optim.weight_decay": Choices(choices=[0.03, 0.1]),
    "loss.temperature": Range(low=0.5, high=4.0, log=True),
    "batch.rows": Choices(choices=[4, 8]),
}


def ran(folder, found=FOUND, values=((4.5,),), **changes):
    """A study over the nano herd whose trials found the same."""
    settings = {
        "base": studies.ROOT / "configs" / "nano.yaml",
        "set": [],
        "space": SPACE,
        "enqueue_defaults": False,
    } | changes
    study = studies.make(folder, **settings)
    made = storages.open_study(study, config.load(study.base, study.set))
    for some in values:
        made.add_trial(create_trial(values=list(some), user_attrs={"overrides": found, "folder": str(folder)}))
    return study


def test_the_rules_written_are_those_from_the_small_model_to_the_large(tmp_path):
    out = tmp_path / "big.yaml"
    scale.write(ran(tmp_path), BIG, out)
    head = out.read_text().partition("run:")[0]
    assert "# Planned cost:" in head and "# days " in head
    made = config.load(out)
    student = made.students["maverick"]
    assert (student.lr, made.teacher.lr, made.optim.weight_decay, made.loss.temperature) == (0.003, 0.002, 0.03, 1.5)
    assert (made.batch.rows, made.run.steps) == (2048, 100000)  # how large the run is stays what it was
    own = SPECS["maverick"].config()
    horizon = Horizon(batch=2048 * 8192 / (4 * 256), tokens=100000 * 2048 * 8192 / (200 * 4 * 256))
    assert transferred_of(made, "maverick", own).rules == scales(SPECS["maverick-nano"].config(), own, horizon)


def climbed(folder, name, base):
    """scout-nano at another width, depth and horizon, from a study over `base`."""
    path = folder / f"{name}.yaml"
    factor = {"middle": 2, "top": 4}[name]
    sizes = {"hidden_size": 128 * factor, "num_hidden_layers": 4 * factor, "num_attention_heads": 4 * factor}
    tree = config_text.parse((studies.ROOT / "configs" / "nano.yaml").read_text())
    tree["students"] = {"scout": {"source": "scout-nano", "overrides": sizes}}
    tree["run"]["steps"] = 200 * factor
    tree["batch"]["rows"] = 8 * factor
    path.write_text(json.dumps(tree))
    study = ran(folder, found=["optim.lr=0.003"], base=base, name=f"below-{name}-{base.stem}",
                space={"optim.lr": Range(low=1e-4, high=1e-1, log=True)})  # fmt: skip
    out = folder / f"{name}-from-{base.stem}.yaml"
    scale.write(study, path, out)
    return out


def test_a_climb_in_stages_ends_where_the_climb_at_once_does(tmp_path):
    nano = studies.ROOT / "configs" / "nano.yaml"
    at_once = config.load(climbed(tmp_path, "top", nano))
    middle = climbed(tmp_path, "middle", nano)
    in_stages = config.load(climbed(tmp_path, "top", middle))
    own = SPECS["scout-nano"].config(**at_once.students["scout"].overrides)
    assert transferred_of(in_stages, "scout", own).rules == transferred_of(at_once, "scout", own).rules
    assert in_stages.students["scout"].transfer == at_once.students["scout"].transfer
    assert "width x2, depth x2" in (tmp_path / "top-from-middle-from-nano.yaml").read_text()


def test_a_fit_gives_its_exponent_and_is_cited(tmp_path):
    slope = {"value": 0.31, "interval": [0.25, 0.37]}
    grid = {"along": "width", "ruled": True, "slope": slope, "moved": 0.4, "excess": 0.001, "sizes": [{"factor": 8}]}
    fit = tmp_path / "transfer.json"
    settings = {"horizon_exponent": 0.5, "depth_exponent": 0.5, "averages": "tokens"}
    fit.write_text(json.dumps({"grids": [grid], "exponents": {"horizon": slope}, "settings": settings}))
    scale.write(ran(tmp_path), BIG, tmp_path / "big.yaml", fit=fit)
    block = config.load(tmp_path / "big.yaml").students["maverick"].transfer
    assert (block.horizon_exponent, block.depth_exponent, block.averages) == (0.31, 0.5, "tokens")
    lines = [line.strip() for line in (tmp_path / "big.yaml").read_text().splitlines()]
    comments = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    assert "width: seen to x8" in comments and "trial 0 of stubbed" in comments
    assert "a step's tokens x16,384" in comments
    assert "horizon_exponent: 0.31 by the fit, 0.31 [0.25, 0.37], which rules out 0.5" in comments


@pytest.mark.parametrize(
    ("fitted", "kept", "why"),
    [
        (
            {"value": 0.15, "interval": [-0.23, 0.52]},
            0.3,
            "0.3, as assumed: the fit, 0.15 [-0.23, 0.52], does not rule it out",
        ),
        ({"value": -0.2, "interval": [-0.3, -0.1]}, 0.0, "0.0 by the fit, -0.20 [-0.30, -0.10], which rules out 0.3"),
        ({"value": 0.6, "interval": None}, 0.3, "0.3, as assumed: the fit, 0.60, is of one seed"),
        (None, 0.3, "0.3, as assumed: the check has no grid over tokens"),
    ],
)
def test_an_exponent_is_the_fits_only_where_the_check_rules_out_the_assumed_one(tmp_path, fitted, kept, why):
    settings = {"horizon_exponent": 0.3, "depth_exponent": 1.0, "averages": "tokens"}
    exponents = {} if fitted is None else {"horizon": fitted}
    path = tmp_path / "transfer.json"
    path.write_text(json.dumps({"grids": [], "exponents": exponents, "settings": settings}))
    fit = scaling.Fit.read(path)
    assert (fit.rules["horizon_exponent"], fit.notes["horizon_exponent"]) == (kept, why)


def test_a_model_is_carried_from_the_one_of_its_name_and_lists_and_sections_as_they_are(tmp_path):
    students = "students={a: {source: scout-nano, lr: 0.001}, b: {source: scout-nano}}"
    found = ["students.b.lr=0.009", "loss.features.0.weight=0.3", "loss.weighting.peak=0.7"]
    space = {
        "students.b.lr": Range(low=1e-3, high=1e-2, log=True),
        "loss.features.0.weight": Range(low=0.1, high=1.0),
        "loss.weighting.peak": Range(low=0.5, high=0.9),
    }
    sets = [students, "loss.features=[{kind: hidden}]", "loss.weighting={kind: lead}"]
    big = tmp_path / "big.yaml"
    source = (studies.ROOT / "configs" / "scout.yaml").read_text()
    tree = config_text.parse(source)
    tree["students"] = {"b": {"source": "scout"}}
    tree["loss"] = {"features": [{"kind": "hidden"}], "weighting": {"kind": "lead"}}
    big.write_text(config_text.write(tree))
    scale.write(ran(tmp_path, found=found, space=space, set=sets), big, tmp_path / "out.yaml")
    made = config.load(tmp_path / "out.yaml")
    assert (made.students["b"].lr, made.loss.features[0].weight, made.loss.weighting.peak) == (0.009, 0.3, 0.7)


def test_several_best_trials_want_a_choice(tmp_path):
    two = [Objective(metric="heldout/scout"), Objective(metric="evals/maverick/parameters")]
    study = ran(tmp_path, objectives=two, values=([4.5, 9.0], [4.6, 8.0]))
    with pytest.raises(ConfigError, match="several trials are best, each in its way; give --trial, one of 0, 1"):
        scale.write(study, BIG, tmp_path / "big.yaml")
    scale.write(study, BIG, tmp_path / "big.yaml", trial=1)
    assert "trial 1 of stubbed" in (tmp_path / "big.yaml").read_text()
    with pytest.raises(ConfigError, match="--trial 7: no complete trial of stubbed; the best is 0"):
        scale.write(study, BIG, tmp_path / "big.yaml", trial=7)


def failing(capsys, words) -> str:
    assert command.main(["scale", *words]) in (2, 4)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def yaml_of(study, folder) -> str:
    path = folder / "study.yaml"
    path.write_text(config_text.write(study.model_dump(mode="json", exclude_none=True)))
    return str(path)


def test_what_cannot_be_carried_is_one_line(tmp_path, capsys):
    fresh = studies.make(tmp_path / "fresh", base=studies.ROOT / "configs" / "nano.yaml")
    from_fresh = ["--from", yaml_of(fresh, tmp_path), "--to", str(BIG)]
    assert "no such study in sqlite" in failing(capsys, from_fresh)
    storages.open_study(fresh, config.load(fresh.base, fresh.set))
    assert "0 of 5 trials have ended, none of them complete" in failing(capsys, from_fresh)
    only_scout = ran(tmp_path / "scout", set=["students={scout: {source: scout-nano}}"])
    line = failing(capsys, ["--from", yaml_of(only_scout, tmp_path), "--to", str(BIG)])
    assert "students.maverick.source = maverick: the study trained models of another kind (scout-nano)" in line
    line = failing(
        capsys, ["--from", yaml_of(ran(tmp_path / "ran"), tmp_path), "--to", str(BIG), "--fit", "absent.json"]
    )
    assert "--fit absent.json: no such file" in line
    again = ran(tmp_path / "again")
    assert command.main(["scale", "--from", yaml_of(again, tmp_path), "--to", str(BIG), "--set", "seed=3"]) == 2
    assert "is another one:\n  seed: -0\n  seed: +3" in capsys.readouterr().err
    to = ["--from", yaml_of(again, tmp_path), "--to", str(BIG)]
    assert f"--out: {BIG} is a file, not a folder" in failing(capsys, [*to, "--out", str(BIG / "big.yaml")])
    assert "a folder; name the file to write" in failing(capsys, [*to, "--out", str(tmp_path)])
    assert "absent.yaml: no such file; --to takes" in failing(capsys, [*to[:3], "absent.yaml"])
    assert "a study; give the configuration" in failing(capsys, [*to[:3], yaml_of(again, tmp_path)])


def test_a_commented_file_reads_back_equal_with_each_note_above_its_key():
    tree = {"a": {"lr": 1e-3, "b": [{"lr": 2}, "x: y"]}, "lr": 3}
    text = annotated.write(tree, {("a", "lr"): "inner", ("lr",): "outer"}, header="top")
    assert config_text.parse(text) == tree
    lines = text.splitlines()
    assert lines[0] == "# top"
    assert lines[lines.index("  # inner") + 1] == "  lr: 0.001"
    assert lines[lines.index("# outer") + 1] == "lr: 3"
