"""The bytes of text each token stands for, whatever alphabet the vocabulary file writes them in.

    token_bytes(tokenizer)[id]          b" caf\\xc3", or None for special tokens

Byte-level BPE (GPT-2, Llama 3 and 4, Qwen) and SentencePiece forms (Llama 2, Gemma) are understood.
"""

import json
import re

from transformers import PreTrainedTokenizerBase

from herd.run.errors import DataError

FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "\u2581"  # what SentencePiece writes for a space


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """Bytes of every id; None for special tokens and for ids without a token.

    Raises DataError for a vocabulary that is written in neither form.
    """
    kinds = _decoder_kinds(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    if "ByteLevel" in kinds:
        alphabet = byte_alphabet()
        read = lambda token: bytes(alphabet[character] for character in token)  # noqa: E731
    elif kinds & {"Metaspace", "Replace", "ByteFallback"}:
        read = _read_sentencepiece
    else:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path}: its decoder ({', '.join(sorted(kinds)) or 'none'}) does not say what "
            "bytes a token stands for; byte-level and SentencePiece vocabularies can be read"
        )
    added = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    out: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, id in vocabulary.items():
        if id not in added:
            out[id] = read(token)
        elif not added[id].special:
            out[id] = added[id].content.encode()
    return out


def byte_alphabet() -> dict[str, int]:
    """The character byte-level BPE writes for each byte: itself if printable in Latin-1, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _read_sentencepiece(token: str) -> bytes:
    fallback = FALLBACK.fullmatch(token)
    return bytes.fromhex(fallback[1]) if fallback else token.replace(SPACE, " ").encode()


def _decoder_kinds(decoder: dict | None) -> set[str]:
    """The types of a tokenizer's decoder and of the decoders it is a sequence of."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_kinds(part) for part in decoder.get("decoders", [])))
