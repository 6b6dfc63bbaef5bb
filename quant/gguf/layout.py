"""Which tensors a GGUF file has: names, types and shapes, and how each is made of the model's own. Rules as data.

entries = layout(config, skeleton, quantised={"model.layers.0.mlp.up_proj", ...}, kind="Q4_0")
rows = entry.arrange(rows);  rows = entry.restore(rows)       # rows of q and k in llama.cpp's order, and back

Names go through gguf's own TensorNameMap, which is llama.cpp's.
"""

import re
from dataclasses import dataclass
from math import prod

import gguf
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from herd.run.errors import ConfigError
from quant.architectures import EXPERT_BANK, architecture, tied_names

ARCHITECTURES = {"LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA, "Llama4ForCausalLM": gguf.MODEL_ARCH.LLAMA4}
# llama.cpp reads these in fp32 whatever the file's type: norms and biases (vectors), and the router.
PRECISE = re.compile(r"\.router\.weight$")
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    name: str
    sources: tuple[str, ...]
    """The model's tensors: one, or those of all experts of a layer in their order, stacked."""
    kind: str
    """F32, BF16, Q4_0 or Q8_0."""
    shape: tuple[int, ...]
    """Outermost first, as in torch."""
    heads: int | None = None
    """Of q and k of a Llama: transformers rotates halves of a head, llama.cpp neighbouring rows."""

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """As bytes: the last dimension is what a row takes."""
        weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return (*self.shape[:-1], self.shape[-1] // weights * size)

    @property
    def bytes(self) -> int:
        return prod(self.byte_shape)

    def arrange(self, rows: Tensor) -> Tensor:
        """Rows of one source in the file's order."""
        return rows if self.heads is None else _transpose_pairs(rows, self.heads, (2, -1))

    def restore(self, rows: Tensor) -> Tensor:
        """The inverse of `arrange`."""
        return rows if self.heads is None else _transpose_pairs(rows, self.heads, (-1, 2))


def gguf_architecture(config: PretrainedConfig) -> gguf.MODEL_ARCH:
    """llama.cpp's name of the architecture; ConfigError for one that is not laid out here."""
    name = architecture(config)
    if name not in ARCHITECTURES:
        raise ConfigError(f"{name} has no GGUF layout here; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def layout(config: PretrainedConfig, skeleton: PreTrainedModel, quantised: set[str], kind: str) -> list[Entry]:
    """The tensors in the order of the model; `quantised` layers have the given kind, the rest are bf16 or fp32."""
    names = gguf.get_tensor_name_map(gguf_architecture(config), config.num_hidden_layers)
    grouped: dict[str, list[str]] = {}
    for name in skeleton.state_dict():
        if name not in tied_names(skeleton):
            grouped.setdefault(_without_expert(name), []).append(name)
    entries = []
    if (config.rope_parameters or {}).get("rope_type", "default") != "default":
        entries.append(Entry(ROPE_FACTORS, (), "F32", (config.head_dim // 2,)))
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    for group, sources in grouped.items():
        mapped = names.get_name(group, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise ConfigError(f"{group}: llama.cpp's {gguf_architecture(config).name} has no such tensor")
        shape = shapes[sources[0]] if group == sources[0] else (len(sources), *shapes[sources[0]])
        plain = "F32" if len(shape) == 1 or PRECISE.search(group) else "BF16"
        stored = kind if sources[0].removesuffix(".weight") in quantised else plain
        entries.append(Entry(mapped, tuple(sources), stored, shape, _heads(config, group)))
    return entries


def _without_expert(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    bank = EXPERT_BANK.match(module)
    return f"{bank['bank']}.{module.rpartition('.')[2]}.{suffix}" if bank else name


def _heads(config: PretrainedConfig, name: str) -> int | None:
    if gguf_architecture(config) != gguf.MODEL_ARCH.LLAMA:
        return None
    if re.search(r"\.q_proj\.(weight|bias)$", name):
        return config.num_attention_heads
    return config.num_key_value_heads if re.search(r"\.k_proj\.(weight|bias)$", name) else None


def _transpose_pairs(rows: Tensor, heads: int, inner: tuple[int, int]) -> Tensor:
    return rows.unflatten(0, (heads, *inner)).transpose(1, 2).reshape(rows.shape)
