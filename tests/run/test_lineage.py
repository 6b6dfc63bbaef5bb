"""Where a model folder came from, for programs and for people."""

import re
import subprocess

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd.run.errors import DataError
from herd.run.lineage import FACTS, git_commit, model_card, read_lineage, write_lineage


def test_lineage_is_read_back_as_written_with_every_fact_present(tmp_path):
    written = write_lineage(tmp_path, role="export", name="scout-int4", student="scout", scheme="int4", path=tmp_path)
    read = read_lineage(tmp_path)
    assert read == written | {"path": str(tmp_path)}
    assert set(FACTS) <= read.keys()
    assert (read["student"], read["teacher"], read["scheme"]) == ("scout", None, "int4")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", read["created"])


def test_a_folder_made_elsewhere_has_no_lineage_and_a_damaged_one_says_so(tmp_path):
    assert read_lineage(tmp_path) == {}
    (tmp_path / "lineage.json").write_text('{"role": "stu')
    with pytest.raises(DataError, match=r"lineage\.json: not JSON"):
        read_lineage(tmp_path)
    (tmp_path / "lineage.json").write_text("[]")
    with pytest.raises(DataError, match="holds a list"):
        read_lineage(tmp_path)


def test_the_commit_is_the_checkouts_head(tmp_path, monkeypatch):
    monkeypatch.setattr("herd.run.lineage.source_root", lambda: tmp_path)
    assert git_commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert git_commit() == head
    (tmp_path / "file").write_text("2")
    assert git_commit() == f"{head}-dirty"


def test_a_card_carries_front_matter_facts_and_the_measured_table(tmp_path):
    rows = [
        {"model": "scout", "held-out nats": 4.31234, "CI 95": [4.2, 4.4], "parameters": 4812345},
        {"model": "scout-int4", "held-out nats": 4.4, "KL to student": 0.0123456},
    ]
    facts = {"name": "scout-int4", "role": "export", "student": "scout", "scheme": "int4", "base_model": "scout"}
    facts |= {"data_fingerprint": "ab12", "licence": "apache-2.0", "metrics": rows, "command": "python -m quant"}
    text = model_card(tmp_path, facts)
    assert (tmp_path / "README.md").read_text() == text
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["license"], head["base_model"], head["tags"]) == ("apache-2.0", "scout", ["distillation", "export"])
    assert "# scout-int4\n\nscout compressed to int4." in text
    assert "| Data fingerprint | ab12 |" in text
    assert "| model | held-out nats | CI 95 | parameters | KL to student |" in text
    assert "| scout | 4.312 | 4.2 .. 4.4 | 4,812,345 |  |" in text
    assert "| scout-int4 | 4.4 |  |  | 0.01235 |" in text
    assert "```\npython -m quant\n```" in text


# Folders of the fixture are shared by the examples on purpose: each writes the same one file again.
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(), st.text(min_size=1))
def test_any_name_or_licence_leaves_the_front_matter_readable(tmp_path, base, licence):
    text = model_card(tmp_path, {"name": "m", "base_model": base, "licence": licence})
    head = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert head["license"] == licence
    assert head.get("base_model", "") == base


def test_a_card_without_measurements_or_licence_claims_neither(tmp_path):
    text = model_card(tmp_path, {"name": "m"})
    assert "Measured" not in text
    assert 'license: "unknown"' in text
