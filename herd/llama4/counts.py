"""Counts what a Llama 4 configuration costs: parameters by kind, FLOPs per token, KV-cache bytes.

    counts = count(SPECS["scout"].full_config())
    counts.total, counts.active, counts.by_kind["routed_experts"]

Parameters are read off transformers' own classes on the meta device, so there is no formula to drift.
"""

from dataclasses import dataclass

import torch
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

KINDS = (
    "embedding",
    "head",
    "attention",
    "routed_experts",
    "shared_experts",
    "dense_mlp",
    "router",
    "norms",
    "vision",
    "projector",
)
# The first marker found in a parameter's name decides, so the longer names stand first.
_MARKERS = (
    ("multi_modal_projector.", "projector"),
    ("vision_model.", "vision"),
    ("embed_tokens.", "embedding"),
    ("lm_head.", "head"),
    ("self_attn.", "attention"),
    ("feed_forward.experts.", "routed_experts"),
    ("feed_forward.shared_expert.", "shared_experts"),
    ("feed_forward.router.", "router"),
    ("feed_forward.", "dense_mlp"),
    ("norm.", "norms"),
)
_BACKWARD_PER_FORWARD = 2  # one product for the gradient of the input, one for that of the weight


@dataclass(frozen=True)
class Counts:
    """Parameter numbers of one configuration."""

    by_kind: dict[str, int]
    """Every kind of KINDS; zero where the model has none."""
    experts: int
    experts_per_token: int
    tied: bool
    """The head is the embedding table: counted once, under `embedding`."""

    @property
    def total(self) -> int:
        """All parameters, vision included."""
        return sum(self.by_kind.values())

    @property
    def text(self) -> int:
        """All parameters but vision and projector."""
        return self.total - self.by_kind["vision"] - self.by_kind["projector"]

    @property
    def active(self) -> int:
        """Text parameters one token meets: head and whole embedding table counted, k of E experts."""
        routed = self.by_kind["routed_experts"]
        return self.text - routed + routed * self.experts_per_token // self.experts

    @property
    def active_without_table(self) -> int:
        """As `active`, without the input embedding table (a lookup costs no product)."""
        return self.active - (0 if self.tied else self.by_kind["embedding"])

    @property
    def active_with_vision(self) -> int:
        """As `active`, for a token of an image."""
        return self.active + self.by_kind["vision"] + self.by_kind["projector"]


def parameter_kind(name: str) -> str:
    """Return the kind (one of KINDS) of the parameter called `name` in transformers' Llama 4."""
    for marker, kind in _MARKERS:
        if marker in name:
            return kind
    raise KeyError(f"{name} is not a parameter of transformers' Llama 4")


def parameter_shapes(config: Llama4Config | Llama4TextConfig) -> dict[str, torch.Size]:
    """Return name -> shape of every parameter, without allocating any."""
    owner = Llama4ForConditionalGeneration if isinstance(config, Llama4Config) else Llama4ForCausalLM
    with torch.device("meta"):
        model = owner(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def count(config: Llama4Config | Llama4TextConfig) -> Counts:
    """Count the parameters of `config`; a Llama4Config's vision tower is included."""
    by_kind = dict.fromkeys(KINDS, 0)
    for name, shape in parameter_shapes(config).items():
        by_kind[parameter_kind(name)] += shape.numel()
    text = config.get_text_config()
    return Counts(by_kind, text.num_local_experts, text.num_experts_per_tok, bool(text.tie_word_embeddings))


def forward_flops(config: Llama4TextConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward pass, averaged over the positions of a sequence of that length (in tokens).

    Two per matmul weight met, plus 4 x heads x head_dim for every key a query sees under its layer's mask (scores and
    weighted sum). Norms, activations and the softmax are left out, as is usual.
    """
    counts = count(config)
    weights = counts.active_without_table - counts.by_kind["norms"]
    keys = sum(_mean_keys(sequence_length, chunk) for chunk in _chunks(config))
    return 2 * weights + 4 * config.num_attention_heads * config.head_dim * keys


def training_flops(config: Llama4TextConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward and backward pass: three times the forward, nothing recomputed."""
    return (1 + _BACKWARD_PER_FORWARD) * forward_flops(config, sequence_length)


def kv_bytes(config: Llama4TextConfig, context: int, *, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values one sequence holds at `context` tokens; chunked layers keep a chunk at most."""
    tokens = sum(context if chunk is None else min(context, chunk) for chunk in _chunks(config))
    return 2 * config.num_key_value_heads * config.head_dim * bytes_per_value * tokens


def _chunks(config: Llama4TextConfig) -> list[int | None]:
    """Attention chunk of every layer; None for full attention."""
    return [config.attention_chunk_size if kind == "chunked_attention" else None for kind in config.layer_types]


def _mean_keys(length: int, chunk: int | None) -> float:
    """Mean number of keys a query sees over `length` positions: causal, and within its chunk where there is one."""
    if chunk is None or chunk >= length:
        return (length + 1) / 2
    whole, rest = divmod(length, chunk)
    return (whole * chunk * (chunk + 1) + rest * (rest + 1)) / (2 * length)
