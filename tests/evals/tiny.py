"""Tiny model folders and rows the evaluation tests share; everything seeded, everything float32 unless said."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evals.rows import Rows

VOCABULARY = 320


def tiny_model(seed: int, *, vocabulary: int = VOCABULARY, longest: int = 64) -> LlamaForCausalLM:
    """Two layers, random weights with logits spread enough that distributions differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=longest,
        initializer_range=0.2,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def tiny_rows(seed: int, *, rows: int = 7, tokens: int = 24, vocabulary: int = VOCABULARY) -> Rows:
    """Random rows of four documents; some labels are not scored."""
    generator = np.random.default_rng(seed)
    ids_NT1 = torch.from_numpy(generator.integers(0, vocabulary, (rows, tokens + 1)))
    labels_NT = ids_NT1[:, 1:].clone()
    labels_NT[0, :5] = -100
    labels_NT[3, -1] = -100
    return Rows(
        ids_NT1[:, :-1], labels_NT, generator.integers(40, 90, rows), np.array([f"d{n % 4}" for n in range(rows)])
    )


def byte_tokenizer(*extra: str) -> PreTrainedTokenizerFast:
    """One token a byte, an end of text, and the extra ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(["<end>", *extra])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def save_tiny(folder: Path, seed: int, *extra_tokens: str) -> Path:
    """A whole model folder: weights, configuration, tokenizer."""
    tiny_model(seed).save_pretrained(folder)
    byte_tokenizer(*extra_tokens).save_pretrained(folder)
    return folder
