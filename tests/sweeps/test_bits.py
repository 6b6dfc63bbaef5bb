"""`python -m sweeps bits`: what is measured is what exports compute and weigh; runs go on; mistakes are one line."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import quant
from evals.footprint import measure_disk
from herd.run.tracking import flush
from quant.loading import route_experts
from quant.shards import write_shards
from sweeps.__main__ import main
from sweeps.bits.mixed_model import MixedModel
from sweeps.bits.problem import make_problem
from sweeps.bits.sensitivities import Sensitivities
from tests.quant.tiny_models import build_llama4

CHOICES = ["int4-g32", "int8", "bf16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer, an MoE layer, a tokenizer of 128 words, and text beside them."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bits") / "model"
    build_llama4(moe_every=2, num_hidden_layers=2).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(128)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2").save_pretrained(folder)
    draw = random.Random(0)
    lines = (" ".join(f"w{draw.randrange(128)}" for _ in range(100)) for _ in range(200))
    (folder.parent / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def words(model: Path, out: Path, *more: str) -> list[str]:
    data = ["--data", str(model.parent / "text.jsonl"), "--sequence-length", "32", "--rows", "4", "--check-rows", "4"]
    return ["bits", "--model", str(model), "--out", str(out), *data, "--choices", *CHOICES, "--no-tracking", *more]


@pytest.fixture(scope="module")
def done(model: Path) -> dict:
    """bits.json of a whole command, tracked."""
    out = model.parent / "out"
    tracked = [word for word in words(model, out) if word != "--no-tracking"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{model.parent / 'mlflow.db'}")
        assert main([*tracked, "--bits", "6", "--active-bits", "9", "--trials", "20", "--around", "bf16"]) == 0
    return json.loads((out / "bits.json").read_text()) | {"out": out}


def test_a_model_that_was_set_to_and_fro_computes_what_the_export_computes(model):
    problem = make_problem(model, CHOICES)
    names = [group.name for group in problem.groups]
    allocation = {name: CHOICES[at % 3] for at, name in enumerate(names)}
    mixed = MixedModel(problem)
    tokens_BT = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        plain_BTV = mixed(input_ids=tokens_BT).logits
        for each in (problem.uniform("int8"), allocation):
            mixed.set(each)
        wanted = route_experts(quant.quantize(model, allocation=allocation).model)
        assert torch.equal(mixed(input_ids=tokens_BT).logits, wanted(input_ids=tokens_BT).logits)
        mixed.set(problem.uniform("bf16"))
        assert torch.equal(mixed(input_ids=tokens_BT).logits, plain_BTV)


def test_results_hold_the_budgets_and_every_allocation_weighs_what_it_was_said_to(model, done, tmp_path):
    sizes = {entry["name"]: entry for entry in done["held_out"]}
    for name in ("dp", "search"):
        assert sizes[name]["bits"] <= 6 and sizes[name]["active_bits"] <= 9
        choices = json.loads((done["out"] / f"{name}.json").read_text())
        quantized = quant.quantize(model, allocation=choices)
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, quantized.plan.headers(), quantized.tensors)
        assert measure_disk(tmp_path / name).tensors == sizes[name]["export_bytes"]
    for name, trial in done["allocations"].items():
        fused = [group for group in trial["choices"] if group.endswith(".experts") or "gate_proj+up_proj" in group]
        assert len(fused) == 3, name  # a dense layer's gate and up, a bank, a shared expert's gate and up


def test_the_dynamic_programme_and_uniform_schemes_are_among_the_trials_and_none_counts_twice(done):
    tried = [tuple(trial["allocation"].values()) for trial in done["trials"]]
    assert len(tried) == len(set(tried)) <= 20
    assert tried[:3] == [tuple([label] * len(done["groups"])) for label in CHOICES]
    assert tuple(done["allocations"]["dp"]["choices"].values()) in tried
    assert done["trials"][2]["kl"] == 0 and done["trials"][0]["kl"] > 0
    assert done["allocations"]["search"]["search_kl"] <= done["allocations"]["dp"]["search_kl"]
    assert (done["out"] / "pareto.png").stat().st_size > 10_000


def test_the_search_is_an_mlflow_run_with_its_numbers_and_files(model, done):
    from mlflow import MlflowClient

    flush(done["out"])  # a busy machine may need longer than the command waits
    client = MlflowClient(f"sqlite:///{model.parent / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("herd").experiment_id])
    (entry,) = (entry for entry in done["held_out"] if entry["name"] == "search")
    assert run.data.metrics["search/kl"] == entry["kl"] and run.data.params["bits"] == "6"
    assert {"bits/dp.json", "bits/pareto.png"} <= {file.path for file in client.list_artifacts(run.info.run_id, "bits")}


def test_the_same_command_measures_only_what_is_missing(model, done):
    path = done["out"] / "sensitivities.json"
    whole = json.loads(path.read_text())
    group = done["groups"][1]["name"]
    part = json.loads(path.read_text())
    part["around"]["bf16"]["kl"][group] = {}
    part["around"]["bf16"]["kl"][done["groups"][0]["name"]]["int8"] = 0.25  # would be mended if it were measured again
    path.write_text(json.dumps(part))
    assert main(words(model, done["out"], "--bits", "int4-g32", "--trials", "20", "--around", "bf16")) == 0
    again = json.loads(path.read_text())["around"]["bf16"]["kl"]
    assert again[group] == whole["around"]["bf16"]["kl"][group]
    assert again[done["groups"][0]["name"]]["int8"] == 0.25
    trials = json.loads((done["out"] / "bits.json").read_text())["trials"]
    assert trials == done["trials"]


def test_choices_that_do_not_fit_are_left_out_unless_they_were_asked_for(model, tmp_path, capsys):
    plan = ["bits", "--model", str(model), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(plan) == 0
    shown = capsys.readouterr().out
    assert "int4-g32" in shown and "int4-g128" not in shown
    assert main([*plan, "--choices", "int4-g128", "bf16"]) == 2
    assert "--choices int4-g128: " in (line := capsys.readouterr().err) and line.endswith("; leave it out\n")
    assert main([*plan, "--data", "nosuch/place/here"]) == 4
    assert "nosuch/place/here" in capsys.readouterr().err


def test_a_search_of_one_trial_has_results_too(model, tmp_path):
    few = ["--choices", "bf16", "int4-g32", "--trials", "1", "--bits", "16", "--around", "bf16"]
    assert main(words(model, tmp_path / "out", *few)) == 0
    assert "dp / best" in (tmp_path / "out" / "bits.md").read_text()


def test_a_command_told_to_stop_says_that_the_same_one_goes_on(model, tmp_path, capsys):
    first = tmp_path / "out" / "sensitivities.json"

    def terminate() -> None:
        while not first.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    waiting = threading.Thread(target=terminate, daemon=True)
    waiting.start()
    assert main(words(model, tmp_path / "out", "--bits", "6", "--trials", "100000")) == 75
    waiting.join()
    assert capsys.readouterr().err.strip() == "stopped; what was measured is kept, and the same command goes on"
    assert json.loads(first.read_text())["around"] and not (tmp_path / "out" / "bits.json").exists()


@pytest.mark.parametrize(
    "more, fault",
    [
        (["--bits", "3"], "--bits 3: the least possible with these --choices is 4.5"),
        (["--active-bits", "4.4"], "--active-bits 4.4: the least possible with these --choices is 4.5"),
        (["--bits", "int4-g3"], "the nearest is int4-g32"),
        (["--choices", "int4-g32", "int9"], "'int9' is no choice; the nearest is int8"),
        (["--choices", "int8"], "give two different ones at least"),
        (["--choices", "int4-g128", "int8"], "do not divide by group_size 128"),
        (["--trials", "0"], "--trials 0: must be 1 or more"),
        (["--bits", "6", "--around", "int4"], "--around int4: use bf16 or one of --choices"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(model, tmp_path, capsys, more, fault):
    assert main(words(model, tmp_path / "out", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and fault in line
    assert not (tmp_path / "out").exists()


def test_sensitivities_around_a_choice_foretell_exactly_what_differs_from_it_in_one_group(model, done):
    problem = make_problem(model, CHOICES)
    content = json.loads((done["out"] / "sensitivities.json").read_text())
    assert main(words(model, done["out"], "--bits", "6", "--trials", "20", "--around", "int8")) == 0
    table = Sensitivities.open(done["out"], problem, content["identity"], around="int8")
    assert table.missing() == []
    one = problem.uniform("int8") | {problem.groups[1].name: "bf16"}
    assert table.foretell(problem.uniform("int8")) == table.base > 0
    assert table.foretell(one) == pytest.approx(table.kl[problem.groups[1].name]["bf16"], rel=1e-12)
    again = json.loads((done["out"] / "sensitivities.json").read_text())
    assert again["around"]["bf16"] == content["around"]["bf16"]


def test_another_search_in_the_same_folder_is_refused(model, done, capsys):
    assert main(words(model, done["out"], "--bits", "6", "--rows", "3")) == 2
    assert "holds a search with rows = " in capsys.readouterr().err


def test_a_dry_run_reads_no_weights_and_writes_nothing(model, tmp_path, capsys):
    assert main(words(model, tmp_path / "out", "--bits", "6", "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert "5 groups" in shown and "10 of one group alone (others int4-g32), then 64 allocations (nsga2)" in shown
    assert not (tmp_path / "out").exists()
