"""Tiny tokenizers of different kinds, trained on a few made-up words in no time.

byte_level(300), byte_level(400, begin=None), sentencepiece(200)
"""

import json
import random

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SYLLABLES = ["la", "ma", "her", "d", "wal", "kra", "ss", "hill", "ï", "中", "文", "🦙", "ing", "self", "(", ") = ", "."]


def text(seed: int, words: int = 400) -> str:
    """Made-up words with characters of one to four bytes."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(SYLLABLES, k=3)) for _ in range(words))


def byte_level(
    size: int,
    *,
    begin: str | None = "<begin>",
    end: str = "<end>",
    seed: int = 0,
    nfc: bool = False,
    backwards: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Llama 3 and 4 have; with `nfc` it normalises, as Qwen does.

    One that learnt from the text `backwards` has hardly any merge of the others.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text(seed)[::-1] if backwards else text(seed)], trainer)
    return _wrap(tokenizer, begin, end)


def sentencepiece(size: int, *, seed: int = 0) -> PreTrainedTokenizerFast:
    """BPE over characters with a space before the text and single bytes for unknown ones, as Llama 2 has."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Character tokens of the rare ones are left out, so that they are spelt in bytes.
    plain = text(seed).replace("🦙", "").replace("文", "")
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size + 257, show_progress=False, special_tokens=special)
    tokenizer.train_from_iterator([plain], trainer)
    # The trainer takes the byte tokens as special ones; in the tokenizer they are plain.
    facts = json.loads(tokenizer.to_str()) | {"added_tokens": []}
    return _wrap(Tokenizer.from_str(json.dumps(facts)), "<s>", "</s>")


def _wrap(tokenizer: Tokenizer, begin: str | None, end: str) -> PreTrainedTokenizerFast:
    names = [name for name in (begin, end, "<other>") if name is not None]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin or end, eos_token=end)
