"""A small corpus on disk and a tokenizer trained on it, shared by the tests of this room."""

import random
from pathlib import Path

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from herd.data.corpora import StoredCorpus, open_corpus
from herd.data.tokenizer_training import train_tokenizer
from herd.run.schema import Data

# No deadline: ranks and other work share the cores. No database: nothing is written into the tree.
settings.register_profile("data", deadline=None, database=None, max_examples=60)
settings.load_profile("data")

SYLLABLES = "la ma her d wal k gra ss hill na ï 中 文 🦙 ing ed re turn def self 12 7 ( ) = . \n\n \t 'll"


def make_text(seed: int, words: int = 300) -> str:
    """Made-up words, the same thousand in every text: enough repetition for merges, no two texts alike."""
    dictionary = random.Random(0)
    known = ["".join(dictionary.choices(SYLLABLES.split(" "), k=3)) for _ in range(1000)]
    return " ".join(random.Random(seed).choices(known, k=words)) + f"\nEnd of text {seed}.\n"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty text files in two folders."""
    root = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        path = root / ("notes" if number % 2 else "code") / f"{number:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(make_text(number), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def data(folder: Path) -> Data:
    return Data(source=str(folder), sequence_length=32, heldout_fraction=0.2, calibration_fraction=0.1)


@pytest.fixture(scope="session")
def corpus(data: Data) -> StoredCorpus:
    opened = open_corpus(data)
    assert isinstance(opened, StoredCorpus)
    return opened


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tokenizer(corpus: StoredCorpus, cache: Path) -> PreTrainedTokenizerFast:
    return train_tokenizer(corpus, vocab_size=512, cache=cache)
