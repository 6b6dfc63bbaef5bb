"""Documents keep their bytes, and cannot forge special tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from herd.data.encoding import bytes_by_offsets, encode_documents
from herd.data.sources import Document
from herd.run.errors import DataError

texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), min_size=1, max_size=5)


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[tuple[np.ndarray, np.ndarray]]:
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    return [(encoded.tokens_L, encoded.bytes_L) for encoded in encode_documents(documents, tokenizer)]


@given(texts=texts)
def test_a_document_comes_back_between_its_separators_with_all_its_bytes(texts: list[str], tokenizer):
    for text, (tokens, sizes) in zip(texts, encode(texts, tokenizer), strict=True):
        assert tokens[0] == tokenizer.bos_token_id and tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[1:-1]) == text
        assert sizes.sum() == len(text.encode())
        assert sizes[0] == sizes[-1] == 0


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_bytes_by_offsets_sum_to_the_text_and_agree_with_the_byte_lengths(text: str, tokenizer):
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    sizes = bytes_by_offsets(text, encoding)
    assert sizes.sum() == len(text.encode())
    if text.isascii():
        assert sizes.tolist() == [len(token) for token in encoding.tokens]


def test_a_text_that_spells_a_special_token_does_not_make_one(tokenizer):
    text = "before <|end_of_text|><|begin_of_text|> after"
    ((tokens, sizes),) = encode([text], tokenizer)
    assert (tokens == tokenizer.eos_token_id).sum() == 1
    assert (tokens == tokenizer.bos_token_id).sum() == 1
    assert sizes.sum() == len(text.encode())
    assert tokenizer(text, add_special_tokens=False).input_ids.count(tokenizer.eos_token_id) == 1  # and it still works


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Not byte-level: words, lower-cased."""
    vocabulary = {"[UNK]": 0, "[END]": 1, "naïve": 2, "llama": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_a_tokenizer_that_is_not_byte_level_counts_bytes_too():
    ((tokens, sizes),) = encode(["Naïve  Llama 🦙 "], word_tokenizer(eos_token="[END]"))
    assert tokens.tolist() == [2, 3, 0, 1]
    assert sizes.tolist() == [6, 7, 6, 0]


def test_one_token_for_begin_and_end_is_set_once():
    ((tokens, _),) = encode(["llama"], word_tokenizer(bos_token="[END]", eos_token="[END]"))
    assert tokens.tolist() == [3, 1]


def test_a_tokenizer_without_separators_is_an_error():
    with pytest.raises(DataError, match="neither a bos_token nor an eos_token"):
        encode(["llama"], word_tokenizer())
