"""llama.cpp itself on our files, where llama-cpp-python is installed: the same tokens and logits.

pip install llama-cpp-python; pytest tests/quant/gguf/test_llama_cpp.py
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

import quant
from tests.quant.gguf.test_gguf import TEXT, exported, models_by_name, tokenizer  # noqa: F401 (fixtures)

llama_cpp = pytest.importorskip("llama_cpp")


def open_model(path: Path) -> tuple:
    """Model and context in fp32 caches, without the kernels for special hardware."""
    settings = llama_cpp.llama_model_default_params()
    settings.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    context = llama_cpp.llama_context_default_params()
    context.n_ctx, context.n_threads, context.n_threads_batch = 128, 1, 1
    context.type_k = context.type_v = llama_cpp.GGML_TYPE_F32
    context.flash_attn_type = 0
    return model, llama_cpp.llama_init_from_model(model, context)


def logits_of(model, context, tokens: list[int]) -> np.ndarray:
    """[T, V], token by token."""
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = []
    for token in tokens:
        batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
        assert llama_cpp.llama_decode(context, batch) == 0
        row = llama_cpp.llama_get_logits_ith(context, -1)
        rows.append(np.ctypeslib.as_array(row, shape=(size,)).copy())
    return np.stack(rows)


@pytest.mark.parametrize("scheme", ["int4", "int8-weights"])
@pytest.mark.parametrize("name", ["scout", "maverick", "llama", "tied", "long"])
def test_llama_cpp_computes_the_model(exported, name: str, scheme: str):  # noqa: F811
    _, folder = exported[name, scheme]
    tokens = torch.randint(0, 432, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        wanted = quant.load(folder).float()(input_ids=torch.tensor([tokens])).logits[0].numpy()
    found = logits_of(*open_model(folder / "model.gguf"), tokens)
    # It rounds activations to 8 bits.
    assert np.linalg.norm(found - wanted) <= 0.05 * np.linalg.norm(wanted)
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() >= 0.85


def test_llama_cpp_cuts_text_into_the_same_tokens(exported, tokenizer):  # noqa: F811
    model, _ = open_model(exported["scout", "int4"][1] / "model.gguf")
    ids = (llama_cpp.llama_token * 256)()
    text = TEXT.encode()
    count = llama_cpp.llama_tokenize(llama_cpp.llama_model_get_vocab(model), text, len(text), ids, 256, True, True)
    assert list(ids[:count]) == tokenizer(TEXT)["input_ids"]
    assert ctypes.sizeof(llama_cpp.llama_token) == 4
