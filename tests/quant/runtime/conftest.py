"""Exports of the tiny models to serve, once for the session."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import quant
from quant.gate_process import GateProcess

SCHEMES = ("int4", "int8", "fp8")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of the tiny models' 128, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:128]
    inner = Tokenizer(BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture(scope="session")
def exports(models: dict, gate: GateProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(model, scheme) -> folder."""
    root = tmp_path_factory.mktemp("served")
    folders = {(name, scheme): root / f"{name}-{scheme}" for name in models for scheme in SCHEMES}
    for (name, scheme), folder in folders.items():
        quantized = quant.quantize(models[name], scheme=scheme, group_size=32)
        quant.export(quantized, folder, gate=gate, tokenizer=byte_tokenizer())
    return folders
