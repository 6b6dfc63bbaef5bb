"""A byte-level BPE trained on the corpus, in seconds, and kept in `.cache/tokenizers/`.

tokenizer = open_tokenizer(config.tokenizer, corpus)      the one at tokenizer.path, or a trained one
"""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from herd.data.cached_folders import build_once
from herd.data.chat_template import CHAT_TEMPLATE
from herd.data.corpora import CACHE, Corpus
from herd.data.special_tokens import BEGIN, END, PAD, SPECIAL_TOKENS
from herd.data.tokenizer import load_tokenizer
from herd.run import schema
from herd.run.errors import DataError

RECIPE = "1"
"""Part of the cache key: raise it when the training below changes."""

TRAINING_BYTES = 32_000_000
"""More text hardly moves the merges and costs memory in proportion."""

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PIECES = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",  # word, with the space or sign before it
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",  # WORD
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",  # punctuation, with the line end after it
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # indentation, less the space that belongs to the next word
        r"\s+",
    )
)
"""What merges never cross: the O200K pattern (published with tiktoken), which Llama 4 follows."""


def open_tokenizer(settings: schema.Tokenizer, corpus: Corpus, *, cache: Path = CACHE) -> PreTrainedTokenizerFast:
    """The tokenizer a configuration asks for: the one at `path`, or one trained on the corpus."""
    if settings.path is not None:
        return load_tokenizer(settings.path)
    return train_tokenizer(corpus, vocab_size=settings.vocab_size, cache=cache)


def train_tokenizer(corpus: Corpus, *, vocab_size: int, cache: Path = CACHE) -> PreTrainedTokenizerFast:
    """Train on the corpus's training part, or take the cached result of the same training.

    `vocab_size` counts the special tokens. Safe in many processes at once: one trains, the others wait for it.
    Raises DataError when the text is too little for so many tokens.
    """
    key = hashlib.sha256(f"{RECIPE} {corpus.fingerprint} {vocab_size}".encode()).hexdigest()[:32]

    def build(folder: Path) -> None:
        dress(_train(corpus, vocab_size)).save_pretrained(folder)

    return load_tokenizer(build_once(cache / "tokenizers" / key, build, what="tokenizer"))


def _train(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909, over bytes) with the special tokens at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    ranks = vocab_size - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=ranks,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    learnt = tokenizer.get_vocab_size()
    if learnt < ranks:
        raise DataError(
            f"tokenizer.vocab_size = {vocab_size}: the training text ({corpus.name}) yields only {learnt} tokens; set "
            f"it to at most {learnt + len(SPECIAL_TOKENS)}, or give more text"
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _texts(corpus: Corpus) -> Iterator[list[str]]:
    documents = corpus.sample("train", TRAINING_BYTES)
    while chunk := [document.text for document in islice(documents, 256)]:
        yield chunk


def dress(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Give a trained BPE its begin, end and padding tokens and the chat template."""
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
