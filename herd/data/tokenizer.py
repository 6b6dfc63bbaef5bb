"""Tokenizers: load one, name it by a digest, say how two differ.

tokenizer = load_tokenizer("runs/demo/teacher")
fault = describe_difference(teacher_tokenizer, student_tokenizer)      None, or one line
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from herd.data.corpora import nearest_names
from herd.data.special_tokens import STOPS
from herd.run import hub
from herd.run.errors import DataError, HerdError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")

PROBE = (
    "def f(x: int = 0x1F) -> str:\n    return f'{x:>8}'  # naïve café, 2 000.50 €\n\n"
    "\tIt's  the Llama's turn; HELLO\r\n\n\n  中文 日本語 Ünïcödé 🦙 \U0001f469\u200d\U0001f52c \u0301e\n"
    "1234567890 <|not_a_token|> <html>&amp;</html>   "
)
"""Code, prose, digits, spaces, line ends, accents, scripts and emoji: what pre-tokenizers disagree about."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load from a folder or by hub id; never runs a repository's code.

    Raises DataError as `check_path` does, for files that cannot be read, and for tokenizers that have no fast
    (`tokenizers`) form; EnvironmentFault for a hub that does not answer.
    """
    check_path(path)
    folder = Path(path).expanduser()
    source = str(folder) if folder.exists() else str(path)
    try:
        with hub.asked(f"tokenizer {path}", source=source):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except HerdError:
        raise
    except Exception as fault:  # `tokenizers` raises bare Exception for files it cannot parse
        line = " ".join(str(fault).split())[:300]
        raise DataError(f"tokenizer {path} cannot be loaded: {line or type(fault).__name__}") from fault
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {path} has no fast form (tokenizer.json); convert it with `transformers` first")
    return tokenizer


def check_path(path: str | Path) -> None:
    """Raise DataError for a folder without tokenizer files, and for what is neither here nor can be a hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        files = ", ".join(TOKENIZER_FILES)
        raise DataError(f"tokenizer {path}: none of {files} in that folder (there is {there}); copy its model's")
    if not folder.exists() and not hub.is_id(str(path)):
        raise DataError(f"tokenizer {path}: no such folder{nearest_names(folder)}")


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all that turns text into ids: vocabulary, merges, special tokens, splitting and normalising rules.

    The format of the files, padding, truncation and the chat template do not enter.
    """
    model = _parts(tokenizer)["model"]
    rules = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    facts = {
        "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]),
        "merges": merges(tokenizer),
        "special": _special(tokenizer),
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "rules": [rules, _parts(tokenizer)["normalizer"], _parts(tokenizer)["pre_tokenizer"]],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def describe_difference(a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast) -> str | None:
    """None when both give every id the same meaning and cut text alike; else the first difference, in one line.

    Compared in this order: ids and tokens (not only their number), special tokens, merges, a probe text.
    """
    tokens_a, tokens_b = _by_id(a), _by_id(b)
    if tokens_a != tokens_b:
        sizes = f"{len(tokens_a)} against {len(tokens_b)} tokens; " if len(tokens_a) != len(tokens_b) else ""
        differing = [id for id in sorted(tokens_a | tokens_b) if tokens_a.get(id) != tokens_b.get(id)]
        first = differing[0]
        return (
            f"vocabularies differ: {sizes}{len(differing)} ids mean different tokens, first id {first}: "
            f"{tokens_a.get(first)!r} against {tokens_b.get(first)!r}"
        )
    for name in ("bos_token", "eos_token"):
        if getattr(a, name) != getattr(b, name):
            return f"special tokens differ: {name} is {getattr(a, name)!r} against {getattr(b, name)!r}"
    if _special(a) != _special(b):
        only = sorted(set(_special(a)) ^ set(_special(b)))
        return f"special tokens differ: {only[0]!r} is special in one of them only ({len(only)} such tokens)"
    for rank, (merge_a, merge_b) in enumerate(zip(merges(a), merges(b), strict=False)):
        if merge_a != merge_b:
            return f"merges differ, first at rank {rank}: {merge_a} against {merge_b}"
    if len(merges(a)) != len(merges(b)):
        return f"merges differ: {len(merges(a))} against {len(merges(b))}"
    ids_a, ids_b = (tokenizer.encode(PROBE, add_special_tokens=False) for tokenizer in (a, b))
    if ids_a != ids_b:
        place = next((n for n, pair in enumerate(zip(ids_a, ids_b, strict=False)) if pair[0] != pair[1]), 0)
        before = a.decode(ids_a[:place])[-20:]
        return (
            f"the same vocabulary cuts text differently (splitting or normalising rules): after {before!r} "
            f"comes {tokens_a[ids_a[place]]!r} against {tokens_b[ids_b[place]]!r}"
        )
    return None


def merges(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """The BPE merges in rank order; empty for other models. Files hold them as pairs or as one string."""
    pairs = _parts(tokenizer)["model"].get("merges", [])
    return [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in pairs]


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that end generation (for generation_config.json): Llama 4's three, or the tokenizer's own end of text."""
    vocabulary = tokenizer.get_vocab()
    stops = [vocabulary[token] for token in STOPS if token in vocabulary]
    return stops or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def _parts(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _by_id(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    return {id: token for token, id in tokenizer.get_vocab().items()}


def _special(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
