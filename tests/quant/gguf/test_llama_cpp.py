"""llama.cpp itself on our files: the same tokens and logits. Needs llama-cpp-python, and is left out without `-m`."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import quant
from tests.quant.gguf.test_gguf import TEXT, exported, models_by_name, tokenizer  # noqa: F401 (fixtures)

pytestmark = pytest.mark.llama_cpp


@pytest.fixture(scope="module")
def library() -> ModuleType:
    import llama_cpp

    return llama_cpp


def open_model(library: ModuleType, path: Path) -> tuple:
    """Model and context with an fp32 cache, without the kernels for special hardware."""
    settings = library.llama_model_default_params()
    settings.use_extra_bufts = False
    model = library.llama_model_load_from_file(str(path).encode(), settings)
    context = library.llama_context_default_params()
    context.n_ctx, context.n_threads, context.n_threads_batch = 128, 1, 1
    context.type_k = context.type_v = library.GGML_TYPE_F32
    context.flash_attn_type = 0
    return model, library.llama_init_from_model(model, context)


def logits_of(library: ModuleType, path: Path, tokens: list[int]) -> np.ndarray:
    """[T, V], token by token."""
    model, context = open_model(library, path)
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    rows = []
    for token in tokens:
        batch = library.llama_batch_get_one((library.llama_token * 1)(token), 1)
        assert library.llama_decode(context, batch) == 0
        rows.append(np.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), shape=(size,)).copy())
    return np.stack(rows)


@pytest.mark.parametrize("scheme", ["int4", "int8-weights"])
@pytest.mark.parametrize("name", ["scout", "maverick", "llama", "tied", "long"])
def test_llama_cpp_computes_the_model(library, exported, name: str, scheme: str):  # noqa: F811
    _, folder = exported[name, scheme]
    tokens = torch.randint(0, 432, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        wanted = quant.load(folder).float()(input_ids=torch.tensor([tokens])).logits[0].numpy()
    found = logits_of(library, folder / "model.gguf", tokens)
    # It rounds activations to 8 bits.
    assert np.linalg.norm(found - wanted) <= 0.05 * np.linalg.norm(wanted)
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() >= 0.85


def test_llama_cpp_cuts_text_into_the_same_tokens(library, exported, tokenizer):  # noqa: F811
    model, _ = open_model(library, exported["scout", "int4"][1] / "model.gguf")
    ids, text = (library.llama_token * 256)(), TEXT.encode()
    count = library.llama_tokenize(library.llama_model_get_vocab(model), text, len(text), ids, 256, True, True)
    assert list(ids[:count]) == tokenizer(TEXT)["input_ids"]
