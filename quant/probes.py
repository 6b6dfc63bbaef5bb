"""What an export must reproduce: tokens, the in-memory model's logits on them, and digests of every tensor.

    probe = take_probe(quantized.model, stored_digests);  probe.save(path);  Probe.open(path)

B rows, T tokens, V vocabulary.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from quant.shards import tensor_bytes

ROWS, TOKENS = 2, 64


@dataclass(frozen=True)
class Probe:
    """What the export must reproduce."""

    input_BT: Tensor
    logits_BTV: Tensor
    stored: dict[str, str]
    """sha256 of every tensor of the export."""
    weights: dict[str, str]
    """sha256 of every parameter of the in-memory model, unpacked."""

    def save(self, path: Path) -> None:
        digests = {"stored": json.dumps(self.stored), "weights": json.dumps(self.weights)}
        save_file({"input_BT": self.input_BT, "logits_BTV": self.logits_BTV.contiguous()}, path, digests)

    @classmethod
    def open(cls, path: Path) -> "Probe":
        with safe_open(path, framework="pt") as file:
            digests = file.metadata()
            tensors = file.get_tensor("input_BT"), file.get_tensor("logits_BTV")
        return cls(*tensors, json.loads(digests["stored"]), json.loads(digests["weights"]))


def take_probe(model: PreTrainedModel, stored: dict[str, str]) -> Probe:
    """Run fixed pseudo-random tokens through the in-memory quantised model."""
    input_BT = probe_tokens(model.config)
    return Probe(input_BT, run(model, input_BT).clone(), stored, digest_weights(model))


def probe_tokens(config: PretrainedConfig) -> Tensor:
    """Fixed pseudo-random tokens [B, T]."""
    text = config.get_text_config()
    length = min(TOKENS, getattr(text, "max_position_embeddings", TOKENS))  # Mamba knows no positions
    return torch.randint(0, text.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def run(model: PreTrainedModel, input_BT: Tensor) -> Tensor:
    """The model's logits [B, T, V]."""
    return model(input_ids=input_BT, use_cache=False).logits


def digest_weights(model: PreTrainedModel) -> dict[str, str]:
    """sha256 of every tensor in a model's state."""
    return {name: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in model.state_dict().items()}
