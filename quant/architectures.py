"""Which layers a model has, which of them stay unquantised and why, and what names its readers accept. Rules as data.

config = read_config(folder)
skeleton = build_skeleton(config)             # on the meta device, experts as the quantised layout has them
reason = kept_because("model.layers.0.self_attn.q_proj", config)     # None: it is quantised
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.quantizers.base import SequentialLlama4TextExperts

from herd.run import bf16_products
from herd.run.errors import ConfigError, DataError, first_line

LLAMA4 = ("Llama4ForCausalLM", "Llama4ForConditionalGeneration")
ADDING = "to add one, give quant/architectures.py its layers and names (docs/quantisation.md)"
SUPPORTED = "Llama4ForCausalLM and any transformers causal LM whose experts, if any, are plain nn.Linear layers"

# What has matrices that are quantised, or that stay in bf16 on purpose.
KNOWN_OWNERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Llama4TextExperts)
# Parameters of two dimensions that no input is multiplied with: Mamba's decays, the positions of a vision tower.
TABLES = re.compile(r"\.(A_log|positional_embedding_vlm)$")


@dataclass(frozen=True)
class Keep:
    """Linear layers whose name matches stay bf16, for a reason that goes into the model card."""

    pattern: str
    reason: str
    llama4_only: bool = False


KEEPS = (
    Keep(r"(^|\.)lm_head$", "the output head decides every token and is a small part of a large model"),
    Keep(r"\.router$", "a router's rounding error changes which expert runs, not only its output", llama4_only=True),
    Keep(
        r"\.self_attn\.[qk]_proj$",
        "servers reorder the rows of q and k of a Llama 4 for their rotary embedding while loading, and only newer "
        "ones reorder packed weights and scales with them",
        llama4_only=True,
    ),
    Keep(
        r"\.self_attn\.v_proj$",
        "vLLM fuses q, k and v into one layer and refuses shards of different schemes, so v follows q and k",
        llama4_only=True,
    ),
    Keep(
        r"\.self_attn\.o_proj$",
        "attention is about 3 % of a Scout: nothing to gain next to the experts, and Meta's own Int4 keeps it too",
        llama4_only=True,
    ),
    Keep(r"(^|\.)(vision_model|multi_modal_projector)\.", "only the language model is compressed", llama4_only=True),
)

# Layers that vLLM merges into one: all of a set are quantised alike, or the folder does not load.
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# ... and the three projections of all experts of one MoE layer.
EXPERT_BANK = re.compile(r"^(?P<bank>.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj)$")

# Names vLLM's loaders map, by architecture (stacked_params_mapping and make_expert_params_mapping in its models).
_STORED = (
    r"(weight|weight_packed|weight_scale|weight_shape|weight_zero_point|weight_global_scale|weight_scale_inv|input_scale"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__nf4))"
)
_LLAMA_MLP = r"mlp\.(gate_proj|up_proj|down_proj)\.(bias|" + _STORED + ")"
_LAYER = r"model\.layers\.\d+\."
_COMMON = (
    r"model\.embed_tokens\.weight",
    r"model\.norm\.weight",
    r"lm_head\.weight",
    _LAYER + r"(input_layernorm|post_attention_layernorm)\.weight",
    _LAYER + r"self_attn\.(q_proj|k_proj|v_proj|o_proj)\.(bias|" + _STORED + ")",
)
_LLAMA4_NAMES = (
    *_COMMON,
    _LAYER + r"feed_forward\.router\.weight",
    _LAYER + r"feed_forward\.((shared_expert|experts\.\d+)\.)?(gate_proj|up_proj|down_proj)\." + _STORED,
)
_LLAMA_NAMES = (*_COMMON, _LAYER + _LLAMA_MLP)
VLLM_NAMES: dict[str, tuple[str, ...]] = {
    "Llama4ForCausalLM": _LLAMA4_NAMES,
    "Llama4ForConditionalGeneration": (
        *(r"language_model\." + name for name in _LLAMA4_NAMES),
        r"(vision_model|multi_modal_projector)\..*",
    ),
    "LlamaForCausalLM": _LLAMA_NAMES,
    "MistralForCausalLM": _LLAMA_NAMES,
    "Qwen2ForCausalLM": _LLAMA_NAMES,
    "Qwen3ForCausalLM": (*_LLAMA_NAMES, _LAYER + r"self_attn\.(q_norm|k_norm)\.weight"),
}


def architecture(config: PretrainedConfig) -> str:
    """Name of the model's class; DataError when config.json names none that transformers has and that writes text."""
    names = config.architectures or []
    known = isinstance(names, list) and len(names) == 1 and getattr(transformers, str(names[0]), None)
    decodes = isinstance(known, type) and issubclass(known, transformers.GenerationMixin)
    if not decodes or getattr(config, "is_encoder_decoder", False):
        raise DataError(f"config.json: architectures = {names}; supported: {SUPPORTED}; {ADDING}")
    return names[0]


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """transformers' own class of the model (code that comes with a model is never run)."""
    return getattr(transformers, architecture(config))


def build_skeleton(config: PretrainedConfig, *, fused: bool = False) -> PreTrainedModel:
    """The model without storage; with `fused` as trained, else with one module per expert as it is stored quantised."""
    bf16_products.install()
    kind = model_class(config)
    with torch.device("meta"):
        try:
            model = kind._from_config(config, dtype=torch.bfloat16)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"config.json: no {kind.__name__} can be built from it ({what}); mend it") from error
        if not fused:
            split_experts(model)
    return model


def bf16_bytes(config: PretrainedConfig) -> int:
    """What the model's weights take in memory."""
    return 2 * sum(parameter.numel() for parameter in build_skeleton(config, fused=True).parameters())


def split_experts(model: PreTrainedModel) -> None:
    """Replace Llama 4's fused experts by transformers' per-expert form, on the current default device, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Llama4TextExperts):
            experts = SequentialLlama4TextExperts(_text(model.config)).to(module.gate_up_proj.dtype)
            model.set_submodule(name, experts)


def check_layout(skeleton: PreTrainedModel) -> None:
    """Refuse fused experts of a layout this package does not know: they would silently stay unquantised."""
    strange = {
        name: parameter.numel()
        for name, parameter in skeleton.named_parameters()
        if parameter.ndim > 1
        and not isinstance(skeleton.get_submodule(name.rpartition(".")[0]), KNOWN_OWNERS)
        and not TABLES.search(name)
    }
    if strange:
        name = max(strange, key=strange.get)
        raise ConfigError(
            f"{name}: fused experts (or other weights) of a layout unknown here; supported: {SUPPORTED}; {ADDING}"
        )


def tied_names(model: nn.Module) -> set[str]:
    """Tensors that are another one under a second name, and so are not stored."""
    if not model.config.get_text_config().tie_word_embeddings:
        return set()
    return set(model.all_tied_weights_keys)


def assemble(config: PretrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A bf16 model with one module an expert, holding the given tensors."""
    bf16_products.install()
    with no_init_weights():
        model = model_class(config)._from_config(config, dtype=torch.bfloat16)
    with torch.device("meta"):
        split_experts(model)
    missing, unexpected = model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    assert not unexpected and set(missing) <= tied_names(model), (missing, unexpected)
    return model


def has_experts(skeleton: PreTrainedModel) -> bool:
    """Whether any layer chooses among experts."""
    return any(EXPERT_BANK.match(name) for name, _ in skeleton.named_modules())


def kept_because(name: str, config: PretrainedConfig) -> str | None:
    """Why a linear layer stays bf16 by default; None when it is quantised."""
    llama4 = architecture(config) in LLAMA4
    for keep in KEEPS:
        if (llama4 or not keep.llama4_only) and re.search(keep.pattern, name):
            return keep.reason
    return None


def split_groups(quantised: set[str], kept: set[str]) -> list[str]:
    """Layers that must be quantised alike but are not: one line for each set that no server could load."""
    members: dict[str, dict[str, str]] = {}
    for state, names in (("quantised", quantised), ("kept", kept)):
        for name in names:
            for group in _merged_with(name):
                members.setdefault(group, {})[state] = name
    return [
        f"{group}: {states['quantised']} is quantised and {states['kept']} is not"
        for group, states in sorted(members.items())
        if len(states) == 2
    ]


def weight_tie(name: str) -> str:
    """What layers that servers merge have in common; those with the same answer share a scale of their weights."""
    parent, _, leaf = name.rpartition(".")
    merged = next((leaves for leaves in MERGED if leaf in leaves), (leaf,))
    return f"{parent}.{'+'.join(merged)}"


def keep_pattern(name: str) -> str:
    """The glob that keeps a layer in bf16, with those that are merged with it, in every decoder layer: for a mend."""
    bank = EXPERT_BANK.match(name)
    group = re.sub(r"\.\d+\.", ".*.", bank["bank"] if bank else weight_tie(name))
    globs = {"q_proj+k_proj+v_proj": "[qkv]_proj", "gate_proj+up_proj": "[gu]*_proj"}
    parent, _, leaves = group.rpartition(".")
    return f"{group}.*" if bank else f"{parent}.{globs.get(leaves, leaves)}"


def input_tie(name: str) -> str:
    """The same for the scale of their inputs, which servers hold once for all experts of a layer."""
    bank = EXPERT_BANK.match(name)
    return weight_tie(f"{bank['bank']}.{name.rpartition('.')[2]}" if bank else name)


def _merged_with(name: str) -> list[str]:
    bank = EXPERT_BANK.match(name)
    if bank:
        return [f"{bank['bank']} (all experts of a layer)"]
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{{{','.join(merged)}}}" for merged in MERGED if leaf in merged]


def _text(config: PretrainedConfig) -> PretrainedConfig:
    return config.get_text_config()
