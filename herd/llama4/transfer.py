"""Hyperparameters found on a small model, carried to a larger one: Complete(d)P for Llama 4 (arXiv 2512.22382).

rules = scales(small_config, large_config, Horizon(batch=4.0, tokens=64.0))       # per kind of tensor, as factors
scale_weights(model, rules); rules["model.layers.0.feed_forward.experts.down_proj"].lr

A factor is for the large model over the small one. m_d width ratio, m_L depth ratio, r batch ratio / token ratio.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.llama4.modeling_llama4 import Llama4ForCausalLM

from herd.run.errors import ConfigError

HEADS = ("lm_head", "router")  # their output is a distribution: like an unembedding
WRITERS = ("o_proj", "down_proj")  # their output goes into the residual stream
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class Horizon:
    """How much more is read: a step's tokens, and the run's."""

    batch: float = 1.0
    tokens: float = 1.0
    exponent: float = 0.3
    """Of the learning rate's fall with the run's tokens: 0.3 fitted by Marin, 0.5 in the paper; fit your own."""
    averages: Literal["tokens", "steps", "run"] = "tokens"
    """What Adam's averages reach over: as many tokens (Marin), as many steps, or the same share of the run (paper)."""

    @property
    def ratio(self) -> float:
        """r: of batch to tokens."""
        return self.batch / self.tokens

    @property
    def lr(self) -> float:
        """sqrt(batch) x tokens^-exponent: sqrt(r) at the paper's exponent."""
        return self.batch**0.5 * self.tokens**-self.exponent


@dataclass(frozen=True)
class Rule:
    """Factors of a tensor's initial spread, AdamW rate, epsilon and decoupled decay (which the rate multiplies)."""

    init: float = 1.0
    lr: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0


def scales(
    small: PretrainedConfig, large: PretrainedConfig, horizon: Horizon | None = None, *, depth_exponent: float = 1.0
) -> dict[str, Rule]:
    """The rule of every parameter of the large model, by name.

    depth_exponent is alpha: residual branches count m_L^-alpha (1 in CompleteP, 0.5 in depth-muP). They are folded into
    the matrices that write to the residual stream, so that checkpoints stay plain: a matrix W' = c W, c = m_L^-alpha,
    that Adam moves by c as much, from a start c times as wide, with gradients 1 / c times as large, is W times c at
    every step. Raises ConfigError for tied embeddings or for models that differ in kind.
    """
    for config in (small, large):
        if config.get_text_config().tie_word_embeddings:
            raise ConfigError("transfer: tied embeddings need one tensor at two rates; set tie_word_embeddings: false")
    shapes = {_family(name): shape for name, shape in shapes_of(small).items()}
    m_depth = large.get_text_config().num_hidden_layers / small.get_text_config().num_hidden_layers
    horizon = horizon or Horizon()
    rules = {}
    for name, shape in shapes_of(large).items():
        before = shapes.get(_family(name))
        if before is None or len(before) != len(shape):
            raise ConfigError(f"transfer: the small model has no tensor like {name}; use the same kind of model")
        rule = _width_and_depth(name, _inputs(name, shape) / _inputs(name, before), len(shape), m_depth, depth_exponent)
        rules[name] = Rule(
            rule.init,
            rule.lr * horizon.lr,
            rule.eps * horizon.ratio**-0.5,
            rule.weight_decay * horizon.ratio**0.5,
        )
    return rules


def betas(small: tuple[float, float], horizon: Horizon) -> tuple[float, float]:
    """Adam's averages over as many tokens, steps, or the same share of the run: 1 - beta grows as b, stays, or as r.

    None reaches over fewer than two steps, unless the small one did.
    """
    growth = {"tokens": horizon.batch, "steps": 1.0, "run": horizon.ratio}[horizon.averages]
    first, second = (1 - min(max(1 - beta, 1 / 2), (1 - beta) * growth) for beta in small)
    return first, second


def scale_weights(model: nn.Module, rules: Mapping[str, Rule]) -> nn.Module:
    """Give freshly drawn weights the spread of the rules, in place. Norms, which start at one, keep theirs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if rules[name].init != 1.0:
                parameter.mul_(rules[name].init)
    return model


def shapes_of(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, from the meta device."""
    with torch.device("meta"):
        model = Llama4ForCausalLM(config.get_text_config())
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _width_and_depth(name: str, m_width: float, dimensions: int, m_depth: float, alpha: float) -> Rule:
    """The paper's table. m_width: of the tensor's own inputs."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    deep = m_depth ** (alpha - 1)
    if leaf == "embed_tokens":
        return Rule(eps=1 / m_width)
    if name == "model.norm.weight":
        return Rule()
    if dimensions == 1:
        return Rule(lr=deep, eps=m_depth**-alpha)
    if leaf in HEADS:
        return Rule(init=1 / m_width, lr=1 / m_width, weight_decay=m_width)
    branch = m_depth**-alpha if leaf in WRITERS else 1.0
    return Rule(
        init=m_width**-0.5 * branch,
        lr=deep / m_width * branch,
        eps=m_depth**-alpha / m_width / branch,
        weight_decay=m_width / branch,
    )


def _inputs(name: str, shape: tuple[int, ...]) -> int:
    """What a tensor's width is: inputs of a matrix, the width of an embedding (1 for norms, whose rules have none)."""
    if len(shape) == 1:
        return 1
    if len(shape) == 3:  # experts are stored [experts, inputs, outputs]
        return shape[1]
    return shape[-1]


def _family(name: str) -> str:
    """A parameter's name without its layer: tensors of one family follow one rule."""
    return _LAYER.sub("*", name)
