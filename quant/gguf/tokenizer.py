"""A byte-level BPE tokenizer as keys of a GGUF file.

values = tokenizer_metadata(tokenizer, vocab_size=4096)        # None: the file takes token ids only
"""

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from herd.data.tokenizer import merges
from herd.data.tokenizer_training import PIECES
from herd.run.errors import ConfigError

# The expression a tokenizer splits text with -> the name under which llama.cpp has it.
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITTERS = {PIECES: "llama4", _O200K: "llama4", _LLAMA3: "llama-bpe"}
ENDS = {"tokenizer.ggml.eot_token_id": "<|eot|>", "tokenizer.ggml.eom_token_id": "<|eom|>"}


def tokenizer_metadata(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> dict[str, Any]:
    """Model, splitter, tokens, their types, merges, special ids and chat template.

    ConfigError for a tokenizer that is not byte-level BPE or splits text in a way llama.cpp has no name for.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    texts, types = _vocabulary(tokenizer, vocab_size)
    plain = tokenizer("a")["input_ids"]
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": splitter(tokenizer),
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges(tokenizer)],
        "tokenizer.ggml.add_bos_token": plain[0] == tokenizer.bos_token_id,
        "tokenizer.ggml.add_eos_token": plain[-1] == tokenizer.eos_token_id,
    }
    ids = {
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
    }
    ids |= {key: tokenizer.get_vocab().get(token) for key, token in ENDS.items()}
    values |= {key: number for key, number in ids.items() if number is not None}
    if isinstance(tokenizer.chat_template, str):
        values["tokenizer.chat_template"] = tokenizer.chat_template
    return values


def splitter(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of the rule that cuts text before merges."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = parts["model"]["type"]
    steps = parts["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    if kind != "BPE" or steps[-1].get("type") != "ByteLevel":
        raise ConfigError(f"tokenizer: {kind} over {steps[-1].get('type')}; GGUF takes byte-level BPE here")
    if len(steps) == 1 and steps[0].get("use_regex", True):
        return "gpt-2"
    expression = steps[0].get("pattern", {}).get("Regex", "")
    if expression not in SPLITTERS or len(steps) != 2:
        raise ConfigError(f"tokenizer: splits text by {expression!r}, which llama.cpp has no name for here")
    return SPLITTERS[expression]


def _vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[list[str], list[int]]:
    by_id = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(by_id) >= vocab_size:
        raise ConfigError(f"tokenizer: id {max(by_id)} is beyond the model's vocabulary of {vocab_size}")
    added = tokenizer.added_tokens_decoder
    texts, types = [], []
    for number in range(vocab_size):
        texts.append(by_id.get(number, f"[PAD{number}]"))
        if number not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif number not in added:
            types.append(gguf.TokenType.NORMAL)
        else:
            types.append(gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED)
    return texts, [int(kind) for kind in types]
