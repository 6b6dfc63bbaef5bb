"""Inputs that gate and up projections met, evenly spaced over the calibration rows.

    kept = Kept(most=4 * columns);  kept.add(input_nK);  kept.inputs()        # at most that many tokens, at least half

n tokens, K input channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from herd.run.errors import ConfigError

PAIR = ("gate_proj", "up_proj")
Activation = Callable[[Tensor], Tensor]


def most_tokens(columns: int) -> int:
    """Tokens of an input that are kept, at most. Many, for the slopes let few of them count."""
    return max(8192, 4 * columns)


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
        self._parts = [torch.cat(self._parts)]
        return self._parts[0]


def activation_of(config: PretrainedConfig) -> Activation:
    """What a decoder puts its gates through; ConfigError where its configuration does not say."""
    text = config.get_text_config()
    name = getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)
    if name not in ACT2FN:
        raise ConfigError(
            f"hidden_act = {name!r} of a {text.model_type}: gptq-gated must know what follows the gates; use gptq"
        )
    return ACT2FN[name]
