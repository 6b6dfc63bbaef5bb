"""The trained tokenizer: Llama 4's layout, every text comes back, one training however many processes ask."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from herd.data.corpora import open_corpus
from herd.data.special_tokens import SPECIAL_TOKENS
from herd.data.tokenizer import stop_token_ids, tokenizer_digest
from herd.data.tokenizer_training import open_tokenizer, train_tokenizer
from herd.run import schema
from herd.run.errors import DataError


def test_special_tokens_follow_the_ranks_in_llama_4s_order(tokenizer):
    assert len(tokenizer) == 512
    first = 512 - len(SPECIAL_TOKENS)
    # Llama 4's own distances from <|begin_of_text|> (200000).
    distances = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|fim_prefix|>": 2,
        "<|fim_suffix|>": 4,
        "<|header_start|>": 5,
        "<|header_end|>": 6,
        "<|eom|>": 7,
        "<|eot|>": 8,
        "<|step|>": 9,
        "<|python_start|>": 16,
        "<|python_end|>": 17,
        "<|finetune_right_pad|>": 18,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) - first for token in distances} == distances
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(first, 512))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (first, first + 1, first + 18)
    assert stop_token_ids(tokenizer) == [first + 1, first + 7, first + 8]


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_special_token_is_one_id_and_comes_back(token: str, tokenizer):
    ids = tokenizer(f"a{token}b", add_special_tokens=False).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids(token)) == 1
    assert tokenizer.decode(ids) == f"a{token}b"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(text: str, tokenizer):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_pieces_keep_words_numbers_and_indentation_apart(tokenizer):
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("    return HTTPError(12345)  # it's\n\n")
    texts = ["".join(piece).replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces]
    assert texts == ["   ", " return", " HTTPError", "(", "123", "45", ")", " ", " #", " it's", "\n\n"]


def test_autotokenizer_loads_the_folder_also_beside_a_llama_4_model(tokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4_text"}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.pad_token == "<|finetune_right_pad|>"


def test_too_little_text_says_how_many_tokens_it_yields(corpus, cache: Path):
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size = 50000: .* yields only \d+ tokens; set it to at most"):
        train_tokenizer(corpus, vocab_size=50_000, cache=cache)
    assert not list((cache / "tokenizers").glob("*.building"))


def test_a_path_wins_over_training(tokenizer, corpus, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path / "mine")
    settings = schema.Tokenizer(path=str(tmp_path / "mine"), vocab_size=600)
    assert len(open_tokenizer(settings, corpus, cache=tmp_path)) == 512


TRAIN = """
import sys
from pathlib import Path
from herd.data.corpora import open_corpus
from herd.data.tokenizer import tokenizer_digest
from herd.data.tokenizer_training import train_tokenizer
from herd.run.schema import Data
corpus = open_corpus(Data(source=sys.argv[1]))
print(tokenizer_digest(train_tokenizer(corpus, vocab_size=400, cache=Path(sys.argv[2]))))
"""


def test_two_processes_that_train_at_once_share_one_result(folder: Path, tmp_path: Path):
    command = [sys.executable, "-c", TRAIN, str(folder), str(tmp_path)]
    root = Path(__file__).parents[2]
    both = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (kept,) = [path for path in (tmp_path / "tokenizers").iterdir() if path.is_dir()]
    corpus = open_corpus(schema.Data(source=str(folder)))
    here = train_tokenizer(corpus, vocab_size=400, cache=tmp_path / "elsewhere")
    assert digests == {tokenizer_digest(here)}  # and a third process learns the same
    assert (kept / "tokenizer.json").is_file()
