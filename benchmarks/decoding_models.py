"""Llama 4 folders with random weights for benchmarks/decoding.py, written one tensor at a time, and their int4 forms.

model = build(folder, "wide");  quantise(folder, folder_int4, group_size=64)
model.bytes_a_token(64)
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig

from quant.formats.grid import Parameters
from quant.plans import Plan, make_plan
from quant.readers import COMPRESSED
from quant.schemes import Scheme
from quant.sections import section
from quant.shards import write_shards
from quant.sources import Source, open_source, read_config

SPREAD = 0.02
VOCABULARY, LAYERS = 4096, 4
SHAPES = {
    # A few large experts; and Scout's own proportions at a quarter of its width.
    "wide": {"hidden_size": 1024, "intermediate_size": 4096, "num_local_experts": 8, "num_attention_heads": 8},
    "scout": {"hidden_size": 1280, "intermediate_size": 2048, "num_local_experts": 16, "num_attention_heads": 10},
}


@dataclass(frozen=True)
class Model:
    """How many weights a model has, and how many a token meets."""

    weights: int
    quantised_a_token: int
    """In the experts and feed-forward layers, which int4 stores in 4 bits."""
    plain_a_token: int
    """In attention, routers, norms and the head, which stay bf16; a row of the embedding is nothing."""

    def bytes_a_token(self, group_size: int | None) -> float:
        """Bytes of weights read for one token: in bf16, or in torch's int4 layout (a scale and a zero for a group)."""
        bits = 16 if group_size is None else 4 + 32 / group_size
        return 2 * self.plain_a_token + bits / 8 * self.quantised_a_token


class RandomTensors(Mapping[str, Tensor]):
    """Normal weights (norms are ones), each drawn when it is asked for, from its place in the list of names."""

    def __init__(self, model: Llama4ForCausalLM):
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.headers = {name: (torch.bfloat16, shape) for name, shape in self.shapes.items()}
        self._numbers = {name: number for number, name in enumerate(self.shapes)}

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        spread = 1.0 if "embed_tokens" in name else SPREAD
        generator = torch.Generator().manual_seed(self._numbers[name])
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, spread, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def build(folder: Path, name: str) -> Model:
    """Write a bf16 folder, unless it is there, and count its weights."""
    shape = SHAPES[name]
    config = Llama4TextConfig(
        **shape, intermediate_size_mlp=4 * shape["hidden_size"], num_hidden_layers=LAYERS, num_key_value_heads=2,
        head_dim=128, num_experts_per_tok=1, interleave_moe_layer_step=1, vocab_size=VOCABULARY,
        max_position_embeddings=8192, attention_chunk_size=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        architectures=["Llama4ForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        tensors = RandomTensors(Llama4ForCausalLM(config))
    if not folder.exists():
        folder.mkdir(parents=True)
        write_shards(folder, tensors.headers, tensors, shard_bytes=1 << 30)
        config.save_pretrained(folder)
    sizes = {name: prod(shape) for name, shape in tensors.shapes.items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    shared = sum(size for name, size in sizes.items() if ".shared_expert." in name)
    plain = sum(sizes.values()) - experts - shared - sizes["model.embed_tokens.weight"]
    return Model(sum(sizes.values()), shared + experts // shape["num_local_experts"], plain)


class RoundedTensors(Mapping[str, Tensor]):
    """The tensors of an int4 form, a layer at a time, with scales of absmax / 7.5: speed does not depend on values."""

    def __init__(self, plan: Plan, source: Source):
        self._plan, self._source = plan, source
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._plan.parts:
            return self._plan.read_kept(self._source, name)
        layer, suffix = self._plan.parts[name]
        if self._last[0] != layer.name:
            weight_NK = self._plan.read_layer(self._source, layer)
            grid = layer.scheme.grid
            absmax_NG = weight_NK.float().unflatten(-1, (grid.groups(weight_NK.shape[-1]), -1)).abs().amax(-1)
            parameters = Parameters(grid.storable(absmax_NG / 7.5))
            self._last = (layer.name, layer.scheme.store(grid.encode(weight_NK, parameters), parameters))
        return self._last[1][suffix]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.headers())

    def __len__(self) -> int:
        return len(self._plan.headers())


def quantise(source: Path, folder: Path, *, group_size: int, container: str = COMPRESSED) -> None:
    """Write an int4 form of a folder, unless it is there."""
    if folder.exists():
        return
    with open_source(source) as opened:
        plan = make_plan(opened, Scheme.named("int4", group_size, container))
        folder.mkdir()
        content = plan.config.to_dict() | {"quantization_config": section(plan.allocation, list(plan.ignored))}
        (folder / "config.json").write_text(json.dumps(content))
        tensors = RoundedTensors(plan, opened)
        if container == COMPRESSED:
            write_shards(folder, plan.headers(), tensors)
            return
        from quant.gguf.reading import MODEL, entries_of
        from quant.gguf.writing import describe_model, write_gguf

        config = read_config(folder)
        values = describe_model(folder, config, folder.name)
        write_gguf(folder / MODEL, config, entries_of(config), values, tensors)
