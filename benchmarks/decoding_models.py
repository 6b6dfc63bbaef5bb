"""Llama 4 folders with random weights for benchmarks/decoding.py, written one tensor at a time.

build(folder, SHAPES["wide"])
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig

from quant.shards import write_shards

SPREAD = 0.02
VOCABULARY = 4096
SHAPES = {
    # Experts as large as memory allows; and Scout's own proportions at a quarter of its width.
    "wide": {"hidden_size": 1024, "intermediate_size": 4096, "num_local_experts": 8, "num_attention_heads": 8},
    "scout": {"hidden_size": 1280, "intermediate_size": 2048, "num_local_experts": 16, "num_attention_heads": 10},
}


class RandomTensors(Mapping[str, Tensor]):
    """Normal weights (norms are ones), each drawn when it is asked for, from its place in the list of names."""

    def __init__(self, model: Llama4ForCausalLM):
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.headers = {name: (torch.bfloat16, shape) for name, shape in self._shapes.items()}
        self._numbers = {name: number for number, name in enumerate(self._shapes)}

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        spread = 1.0 if "embed_tokens" in name else SPREAD
        generator = torch.Generator().manual_seed(self._numbers[name])
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, spread, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def build(folder: Path, shape: dict[str, int], *, layers: int) -> dict[str, int]:
    """Write a bf16 folder; returns how many weights it has, and how many a token meets."""
    config = Llama4TextConfig(
        **shape, intermediate_size_mlp=4 * shape["hidden_size"], num_hidden_layers=layers, num_key_value_heads=2,
        head_dim=128, num_experts_per_tok=1, interleave_moe_layer_step=1, vocab_size=VOCABULARY,
        max_position_embeddings=8192, attention_chunk_size=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        architectures=["Llama4ForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        tensors = RandomTensors(Llama4ForCausalLM(config))
    folder.mkdir()
    write_shards(folder, tensors.headers, tensors, shard_bytes=1 << 30)
    config.save_pretrained(folder)
    sizes = {name: tensors._shapes[name] for name in tensors}
    total = sum(torch.Size(size).numel() for size in sizes.values())
    experts = sum(torch.Size(size).numel() for name, size in sizes.items() if ".experts." in name)
    embedding = VOCABULARY * shape["hidden_size"]
    return {"weights": total, "weights_a_token": total - experts + experts // shape["num_local_experts"] - embedding}
