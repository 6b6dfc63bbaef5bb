"""Inputs that gate and up projections met, evenly spaced over the calibration rows, and what their errors do there.

    kept = Kept(most=4 * columns);  kept.add(input_nK);  kept.inputs()        # at most that many tokens, at least half
    sample_of(parts, "gate_proj", input_nK, F.silu)                           # quant.methods.method.Sample

n tokens, K input channels, N output channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from herd.run.errors import ConfigError
from quant.methods.method import Sample

PAIR = ("gate_proj", "up_proj")
Activation = Callable[[Tensor], Tensor]


def most_tokens(columns: int) -> int:
    """Tokens of an input that are kept, at most. Many, for the slopes let few of them count."""
    return max(8192, 4 * columns)


@dataclass(frozen=True)
class Linear:
    """A projection as it was before it was rounded."""

    weight_NK: Tensor
    bias_N: Tensor | None

    def outputs(self, input_nK: Tensor, rows: slice) -> Tensor:
        """Those of some channels [n, N], fp32."""
        bias_N = None if self.bias_N is None else self.bias_N[rows].float()
        return F.linear(input_nK.float(), self.weight_NK[rows].float(), bias_N)


class Kept:
    """Every so many-th token of a stream, twice as rare whenever there would be too many: no chance is involved."""

    def __init__(self, most: int):
        self._most = most
        self._stride = 1
        self._met = 0
        self._parts: list[Tensor] = []

    def add(self, input_nK: Tensor) -> None:
        """Take in what comes next of the stream."""
        first = -self._met % self._stride
        self._met += len(input_nK)
        self._parts.append(input_nK[first :: self._stride].clone())
        while sum(map(len, self._parts)) > self._most:
            self._parts = [self.inputs()[::2].clone()]
            self._stride *= 2

    def inputs(self) -> Tensor:
        """The tokens kept [n, K]."""
        return torch.cat(self._parts)


def activation_of(config: PretrainedConfig) -> Activation:
    """What a decoder puts its gates through; ConfigError where its configuration does not say."""
    text = config.get_text_config()
    name = getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)
    if name not in ACT2FN:
        raise ConfigError(
            f"hidden_act = {name!r} of a {text.model_type}: gptq-gated must know what follows the gates; use gptq"
        )
    return ACT2FN[name]


def sample_of(parts: Mapping[str, Linear], leaf: str, input_nK: Tensor, activation: Activation) -> Sample:
    """The inputs, with the slopes of act(gate) up by gate or by up (`leaf`)."""

    def slopes(rows: slice) -> Tensor:
        gate_nN = parts["gate_proj"].outputs(input_nK, rows)
        if leaf == "up_proj":
            return activation(gate_nN)
        with torch.enable_grad():
            gate_nN.requires_grad_()
            (slope_nN,) = torch.autograd.grad(activation(gate_nN).sum(), gate_nN)
        return slope_nN * parts["up_proj"].outputs(input_nK, rows)

    return Sample(input_nK, slopes)
