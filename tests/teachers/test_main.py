"""`python -m teachers`: offline caching, resuming, completing, planning, looking inside, and mistakes in one line.

Run: pytest tests/teachers/test_main.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from herd.data.corpora import open_corpus
from herd.data.packing import pack_rows
from herd.data.streams import RowStream, batch_of
from herd.data.tokenizer import load_tokenizer
from herd.llama4.source import open_model
from herd.run.errors import DataError
from herd.run.lineage import write_lineage
from herd.run.schema import Data
from teachers import cache
from teachers.__main__ import main
from teachers.cache.identity import LINEAGE_KEY
from tests.evals.tiny import VOCABULARY, save_tiny

LENGTH = 32


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a teacher and two sources of text."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "teacher", 0)
    for name, first in (("texts", 0), ("more", 100)):
        (tmp_path / name).mkdir()
        for n in range(first, first + 12):
            text = f"The llama number {n} ate {n * 7} leaves and slept. " * 6
            (tmp_path / name / f"{n}.txt").write_text(text)
    return tmp_path


def command(*more: str, out: str = "cached", model: str = "teacher", data: str = "texts") -> list[str]:
    words = ["cache", "--model", model, "--data", data, "--out", out, "--sequence-length", str(LENGTH)]
    return [*words, "--no-tracking", *more]


def packed(source: str = "texts"):
    data = Data(source=source, sequence_length=LENGTH)
    return pack_rows(open_corpus(data), load_tokenizer("teacher"), "train", LENGTH)


def run(words: list[str], capsys: pytest.CaptureFixture) -> dict:
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_help_and_usage_errors_come_before_torch():
    code = """
import sys
from teachers.__main__ import main
print(main(["--help"]), main(["bake"]))
for words in (["cache", "--help"], ["cache", "--modle", "x"], ["inspect"]):
    try:
        main(words)
    except SystemExit as stop:
        print(stop.code)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m teachers")
    assert [line for line in done.stdout.splitlines() if line in ("0 2", "0", "2")] == ["0 2", "0", "2", "2"]
    assert "did you mean --model?" in done.stderr and "bake: no such command" in done.stderr


def test_what_is_cached_is_what_the_teacher_says_of_every_row(place, capsys):
    result = run(command("--codec", "top_k=6", "--micro-rows", "3"), capsys)
    rows = packed()
    assert result["rows"] == result["rows_added"] == len(rows)
    reader = cache.open(Path("cached"), expecting=None)
    batch = batch_of(rows, torch.arange(len(rows)).numpy())
    targets = reader.targets(batch.keys_B, batch.input_ids_BT)
    with torch.no_grad():
        logits_TV = open_model("teacher")(input_ids=batch.input_ids_BT).logits.flatten(0, 1)
    logs_TV = logits_TV.double().log_softmax(-1)
    ce_T = -logs_TV.gather(1, batch.labels_BT.flatten()[:, None])[:, 0]
    torch.testing.assert_close(targets.ce_T.double(), ce_T, rtol=0, atol=1e-2)
    torch.testing.assert_close(targets.entropy_T.double(), -(logs_TV.exp() * logs_TV).sum(-1), rtol=0, atol=2e-2)
    at_TK = logs_TV.exp().gather(1, targets.ids_TK.clamp_min(0)) * (targets.ids_TK >= 0)
    torch.testing.assert_close(targets.probs_TK.double(), at_TK, rtol=0, atol=1 / 2048)
    assert (at_TK.sum(-1) - logs_TV.exp().topk(6).values.sum(-1)).abs().max() < 6 / 4096


def test_started_again_only_missing_rows_are_made_and_they_are_those_training_reads_first(place, capsys):
    assert run(command("--rows", "5"), capsys)["rows_added"] == 5
    assert run(command("--rows", "9"), capsys)["rows_added"] == 4
    first = RowStream(packed(), seed=0).rows_of_step(0, 9)
    reader = cache.open(Path("cached"), expecting=None)
    assert sorted(reader.keys_N.tolist()) == sorted(packed().keys_N[first].tolist())
    whole = run(command(out="whole"), capsys)
    assert run(command(), capsys)["rows"] == whole["rows"]
    one, other = (cache.open(Path(name), expecting=None) for name in ("cached", "whole"))
    assert [bytes(one.payload(at)) for at in range(len(one))] == [bytes(other.payload(at)) for at in range(len(other))]


def test_ranks_share_the_rows(place, capsys, monkeypatch):
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(command("--json")) == 0
    text = capsys.readouterr().out
    rows = len(packed())
    assert json.loads(text)["rows"] == rows and json.loads(text)["rows_added"] == (rows + 1) // 2
    assert {path.name for path in Path("cached").glob("*.bin")} == {"rank0.00000.bin", "rank1.00000.bin"}


def test_complete_takes_settings_from_the_cache_and_may_add_data(place, capsys):
    run(command("--codec", "rs_kd=5", "--temperature", "2", "--seed", "3"), capsys)
    complete = ["cache", "--model", "teacher", "--out", "cached", "--complete", "--no-tracking"]
    assert run(complete, capsys)["rows_added"] == 0
    assert main(command(data="more")) == 4
    assert "temperature is 2.0 in the cache, 1.0 in this run" in capsys.readouterr().err
    assert main(command("--codec", "rs_kd=5", "--temperature", "2", "--seed", "3", data="more")) == 4
    assert "add this data's rows with python -m teachers cache --complete" in capsys.readouterr().err
    added = run([*complete, "--data", "more"], capsys)
    assert added["rows_added"] == len(packed("more"))
    found = run(["inspect", "cached"], capsys)
    assert found["rows"] == len(packed()) + len(packed("more"))
    assert found["codec"] == "rs_kd=5" and found["temperature"] == 2.0 and len(found["data"]) == 2


def test_a_teacher_that_changed_is_stale_unless_the_cache_was_written_while_it_trained(place, capsys):
    run(command("--rows", "4"), capsys)
    save_tiny(place / "other", 1)
    assert main(command(model="other")) == 4
    assert "teacher is" in capsys.readouterr().err
    manifest = cache.open(Path("cached"), expecting=None).manifest
    identity = cache.Identity(**{**vars(manifest.identity), "teacher": "run nano, seed 0"})
    made = cache.create(Path("through"), identity, manifest.codec)
    rows = batch_of(packed(), torch.arange(2).numpy())
    with made.writer() as writer:
        from teachers.targets import DenseTargets

        logits_TV = torch.zeros(2 * LENGTH, VOCABULARY)
        writer.append(DenseTargets(logits_TV), rows.keys_B, rows.input_ids_BT, rows.labels_BT, step=70)
    complete = command("--complete", out="through", model="other")
    assert main(complete) == 4
    write_lineage(place / "other", role="teacher", **{LINEAGE_KEY: "run nano, seed 0"})
    capsys.readouterr()
    assert run(complete, capsys)["rows_added"] == len(packed()) - 2
    assert set(cache.open(Path("through"), expecting=identity).steps_N.tolist()) == {70}


def test_a_dry_run_foretells_rows_bytes_and_hours_and_writes_nothing(place, capsys):
    plan = run(command("--dry-run", "--tokens-per-second", "100", "--students", "3", "--epochs", "2"), capsys)
    assert not Path("cached").exists()
    result = run(command(), capsys)
    assert plan["tokens"] == result["tokens"]
    assert plan["dense_bytes"] == 2 * VOCABULARY * plan["tokens"]
    once = plan["tokens"] / 100 / 3600
    assert plan["hours"] == pytest.approx(
        {"online together": 2 * once, "online each": 6 * once, "write-through": 0, "offline": once}
    )
    assert main(command("--dry-run")) == 0
    assert "H100" in capsys.readouterr().out


def test_a_dry_run_plans_a_spec_at_full_size_and_stays_under_36_bytes_a_token(place, capsys):
    words = ["cache", "--model", "behemoth", "--tokens", "1e12", "--out", "x", "--dry-run", "--sequence-length", "8192"]
    plan = run([*words, "--world-size", "8", "--mfu", "0.5"], capsys)
    assert plan["vocabulary"] == 202_048 and plan["bytes_per_token"] < 36
    assert plan["tokens_per_second"] == pytest.approx(8 * 989e12 * 0.5 / plan["flops_per_token"])


def test_inspect_and_verify_say_what_is_there_and_what_is_damaged(place, capsys):
    run(command(), capsys)
    found = run(["inspect", "cached"], capsys)
    assert found["classes_per_token"] == pytest.approx(14, rel=0.05)
    assert found["bytes"] == sum(path.stat().st_size for path in Path("cached").iterdir())
    assert main(["inspect", "cached"]) == 0
    assert "complete with" in capsys.readouterr().out
    assert run(["verify", "cached"], capsys)["faults"] == []
    path = Path("cached") / "rank0.00000.bin"
    content = bytearray(path.read_bytes())
    content[300] ^= 4
    path.write_bytes(content)
    assert main(["verify", "cached"]) == 4
    told = capsys.readouterr().err
    assert "its content does not have the digest" in told and "fails its checksum" in told
    with pytest.raises(DataError):
        reader = cache.open(Path("cached"), expecting=None)
        for at in range(len(reader)):
            reader.kept(at)


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (command(model="nowhere"), 2, "--model nowhere: no such folder; give the folder of a saved model or a hub id"),
        (command(data="no where"), 4, "data.source = no where: no such file or folder"),
        (command("--codec", "top_k=321"), 2, "top_k=321 is more than the vocabulary of 320"),
        (command("--codec", "best=3"), 2, "--codec best=3: must be one of head_and_tail=N"),
        (command("--sequence-length", "65"), 2, "--sequence-length = 65: the teacher reads at most 64 tokens"),
        (command("--sequence-length", "4"), 2, "--sequence-length = 4: must be at least 8"),
        (command("--rows", "0"), 2, "--rows = 0: must be at least 1"),
        (command("--tokens", "nan"), 2, "--tokens = nan: must be at least 1"),
        (command("--tokens-per-second", "inf"), 2, "--tokens-per-second = inf: must be more than 0"),
        (command("--temperature", "0"), 2, "--temperature = 0: must be more than 0"),
        (command("--complete"), 2, "--out cached: no cache.json in it to complete"),
        (command(out="file.txt"), 2, "--out file.txt: is a file"),
        (command("--device", "potato"), 2, "--device potato: no such kind of device; use cpu, cuda or cuda:N"),
        (command("--device", "hpu"), 3, "--device hpu: not usable on this machine"),
        (["inspect", "texts"], 4, "texts: no cache.json in it"),
        (["verify", "texts"], 4, "texts: no cache.json in it"),
    ],
)
def test_a_mistake_is_one_line_and_a_code(place, capsys, words, code, line):
    (place / "file.txt").write_text("x")
    assert main(words) == code
    error = capsys.readouterr().err.strip()
    assert line in error and len(error.splitlines()) == 1


def test_the_command_is_an_mlflow_run(place, monkeypatch):
    from mlflow import MlflowClient

    uri = f"sqlite:///{place / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    words = [word for word in command("--rows", "4", "--experiment", "caches") if word != "--no-tracking"]
    assert main(words) == 0
    assert main([*words, "--rows", "6"]) == 0
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("caches").experiment_id])
    assert run.data.params["identity.teacher"] == cache.open(Path("cached"), expecting=None).manifest.identity.teacher
    assert run.data.metrics["cache/rows"] == 6 and run.data.tags["herd.role"] == "cache"
    assert [entry.path for entry in client.list_artifacts(run.info.run_id) if entry.path == "cache.json"]


def test_a_teacher_of_several_sources_is_cached_over_one_at_a_time(place: Path, capsys):
    sources = {name: {"source": str(place / name)} for name in ("texts", "more")}
    data = Data(sources=sources, sequence_length=LENGTH).model_dump(mode="json")
    write_lineage(place / "teacher", role="teacher", data_config=data)
    words = ["cache", "--model", "teacher", "--out", "cached", "--no-tracking"]
    assert main(words) == 2
    assert "--data: rows of one source at a time; give one of texts, more" in capsys.readouterr().err
    made = run([*words, "--data", "more"], capsys)
    keys = packed(str(place / "more")).keys_N
    assert set(cache.open(place / "cached", expecting=None).keys_N.tolist()) == set(keys.tolist()) and made
