"""A teacher that is only read. pytest tests/teachers/test_frozen.py"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from teachers.frozen import FrozenTeacher
from teachers.targets import CHUNK_TOKENS

VOCABULARY = 3000


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **kwargs or {})
        if isinstance(given, torch.Tensor):
            self.elements = max(self.elements, given.numel())
        return given


def test_a_score_is_the_models_loss_and_never_holds_the_vocabulary_of_all_tokens():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY))
    ids_BT = torch.randint(0, VOCABULARY, (3, CHUNK_TOKENS))
    labels_BT = torch.where(torch.rand(ids_BT.shape) < 0.2, -100, ids_BT.roll(-1, 1))
    with Largest() as largest:
        nats, count = FrozenTeacher(model).score(ids_BT, labels_BT.flatten())
    assert largest.elements <= CHUNK_TOKENS * VOCABULARY
    logits_TV = model(input_ids=ids_BT).logits.flatten(0, 1).double()
    expected = torch.nn.functional.cross_entropy(logits_TV, labels_BT.flatten(), reduction="sum")
    assert nats == pytest.approx(expected.item(), rel=1e-6) and count == int((labels_BT != -100).sum())
