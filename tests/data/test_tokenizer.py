"""Digests name what a tokenizer does, differences are told in one line, and broken folders too."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from herd.data.special_tokens import BEGIN, END, PAD
from herd.data.tokenizer import describe_difference, load_tokenizer, tokenizer_digest
from herd.data.tokenizer_training import train_tokenizer
from herd.run.errors import DataError
from herd.run.ranks import free_port


def edited(tokenizer: PreTrainedTokenizerFast, edit, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose JSON was changed by `edit`."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    edit(content)
    names = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD} | special
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **names)


def swap_tokens(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]


def swap_merges(content: dict) -> None:
    content["model"]["merges"][0:2] = content["model"]["merges"][1::-1]


def drop_merge(content: dict) -> None:
    content["model"]["merges"].pop()


def split_digits_singly(content: dict) -> None:
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace(r"\p{N}{1,3}", r"\p{N}|[^\r\n\p{N}\p{L}]?\p{L}")


def lower_case(content: dict) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def one_not_special(content: dict) -> None:
    content["added_tokens"][9]["special"] = False


def change_nothing(content: dict) -> None:
    pass


@pytest.mark.parametrize(
    ("edit", "special", "expected"),
    [
        (swap_tokens, {}, r"2 ids mean different tokens, first id \d+: 'A' against 'B'"),
        (swap_merges, {}, r"merges differ, first at rank 0: \("),
        (drop_merge, {}, r"merges differ: \d+ against \d+"),
        (split_digits_singly, {}, r"cuts text differently .* after '.*' comes '.*' against '.*'"),
        (lower_case, {}, "cuts text differently"),
        (one_not_special, {}, r"'<\|step\|>' is special in one of them only"),
        (change_nothing, {"eos_token": "<|eot|>"}, r"eos_token is '<\|end_of_text\|>' against '<\|eot\|>'"),
    ],
)
def test_a_difference_is_told_in_one_line_and_changes_the_digest(edit, special, expected, tokenizer):
    other = edited(tokenizer, edit, **special)
    line = describe_difference(tokenizer, other)
    assert line is not None and "\n" not in line
    assert re.search(expected, line), line
    assert describe_difference(other, tokenizer) is not None
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)


def test_different_sizes_are_told_with_the_first_id_that_differs(corpus, cache, tokenizer):
    larger = train_tokenizer(corpus, vocab_size=520, cache=cache)
    line = describe_difference(tokenizer, larger)
    assert line.startswith("vocabularies differ: 512 against 520 tokens;")
    assert "first id 480: '<|begin_of_text|>' against " in line


def test_equal_tokenizers_have_no_difference_and_one_digest(tokenizer):
    other = edited(tokenizer, change_nothing, pad_token=END)  # padding gives no id another meaning
    assert describe_difference(tokenizer, other) is None
    assert tokenizer_digest(other) == tokenizer_digest(tokenizer)


def test_the_digest_does_not_see_the_format_of_the_files(tokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]  # the older spelling
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    path.write_text(json.dumps(content, indent=7, ensure_ascii=True))
    assert tokenizer_digest(load_tokenizer(tmp_path)) == tokenizer_digest(tokenizer)


def test_the_digest_does_not_see_padding_and_truncation(tokenizer):
    own = edited(tokenizer, lambda content: None)  # a call leaves its truncation behind; others share the fixture
    own(["a", "b b b b b"], padding=True, truncation=True, max_length=3)
    assert own.backend_tokenizer.truncation is not None
    assert tokenizer_digest(own) == tokenizer_digest(tokenizer)


def test_folders_that_cannot_be_loaded_are_told_in_one_line(tokenizer, tmp_path: Path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    tokenizer.save_pretrained(tmp_path / "torn")
    torn = tmp_path / "torn" / "tokenizer.json"
    torn.write_text(torn.read_text()[:5000])
    for path, expected in {
        tmp_path / "bare": r"none of tokenizer\.json.* \(there is config\.json\)",
        tmp_path / "torn": "torn cannot be loaded: ",
        tmp_path / "tron": r"no such folder \(nearest: '.*torn'",
        "nobody/nothing": "nobody/nothing cannot be loaded: ",
    }.items():
        with pytest.raises(DataError, match=expected) as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)


UNREACHABLE = """
import sys
from herd.data.tokenizer import load_tokenizer
from herd.run import cli
print(len(load_tokenizer("herd/cached")))
sys.exit(cli.main_guard(lambda: load_tokenizer("herd/absent")))
"""


def test_without_a_network_a_cached_tokenizer_loads_and_any_other_is_refused_at_once(tokenizer, tmp_path: Path):
    repository = tmp_path / "hub" / "models--herd--cached"
    commit = "0123456789" * 4
    tokenizer.save_pretrained(repository / "snapshots" / commit)
    (repository / "snapshots" / commit / "config.json").write_text('{"model_type": "llama"}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    endpoint = f"http://127.0.0.1:{free_port()}"
    outside = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", UNREACHABLE],
        env=outside | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "512\n")
    (line,) = done.stderr.splitlines()  # and no word of the hub's client about trying again
    assert line.startswith(f"error: tokenizer herd/absent: the hub ({endpoint}) does not answer ([Errno 111]")
