"""Second moments of layers' inputs over the calibration rows.

    moments = measure(decoder, 3, layer, batches, names)
    moments.hessian("...experts.5.gate_proj"), moments.tokens["...experts.5.gate_proj"]

An expert's inputs are those of the tokens routed to it, as the model scales them: routed-only cost. K input channels,
n tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quant.architectures import EXPERT_BANK
from quant.calibration.decoder import Decoder
from quant.calibration.stages import input_key

Watch = Callable[[str, Tensor], None]


@dataclass
class Moments:
    """Sums of x x^T and token counts, by `input_key`; those of all experts of a bank together by the bank's name."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    banks: dict[str, Tensor] = field(default_factory=dict)
    bank_tokens: dict[str, int] = field(default_factory=dict)
    absmax: dict[str, float] = field(default_factory=dict)

    def hessian(self, key: str, columns: int) -> Tensor:
        """The mean of x x^T [K, K], fp32, drawn towards a prior worth K tokens where an expert met few.

        (n H + K P) / (n + K), with P the mean over the tokens of all experts for inputs that the experts share (gate,
        up), and a multiple of the identity with the trace of H for an expert's own inner channels (down). Without a
        single token it is the identity, with which every method rounds to nearest.
        """
        count = self.tokens.get(key, 0)
        if count == 0:
            return torch.eye(columns)
        mean_KK = self.sums[key] / count
        bank = bank_of(key)
        if bank is None or count >= FEW * columns:
            return mean_KK
        if key.endswith(".down_proj"):
            prior_KK = torch.eye(columns) * mean_KK.diagonal().mean()
        else:
            prior_KK = self.banks[bank] / self.bank_tokens[bank]
        return (count * mean_KK + columns * prior_KK) / (count + columns)


FEW = 4  # times K tokens: an expert that met more is taken at its word


def bank_of(name: str) -> str | None:
    """The bank an expert's layer belongs to; None for other layers."""
    found = EXPERT_BANK.match(name)
    return found["bank"] if found else None


@torch.no_grad()
def measure(
    decoder: Decoder,
    index: int,
    layer: nn.Module,
    batches: Iterable[Tensor],
    names: Iterable[str],
    *,
    summed: Iterable[str] | None = None,
) -> Moments:
    """Run rows through a decoder layer and take the moments of the inputs of the named layers.

    summed: the keys whose sums are kept (all); the sums of banks and the counts are always of all.
    """
    moments = Moments()
    kept = None if summed is None else set(summed)

    def watch(key: str, input_nK: Tensor) -> None:
        input_nK = input_nK.float()
        square_KK = input_nK.T @ input_nK
        moments.tokens[key] = moments.tokens.get(key, 0) + len(input_nK)
        moments.absmax[key] = max(moments.absmax.get(key, 0.0), float(input_nK.abs().max()))
        if kept is None or key in kept:
            _add(moments.sums, key, square_KK)
        bank = bank_of(key)
        if bank is not None and not key.endswith(".down_proj"):
            _add(moments.banks, bank, square_KK)
            moments.bank_tokens[bank] = moments.bank_tokens.get(bank, 0) + len(input_nK)

    with watching(layer, f"{decoder.prefix}.{index}.", names, watch):
        for hidden_BTH in batches:
            decoder.run(index, layer, hidden_BTH)
    return moments


@contextmanager
def watching(layer: nn.Module, prefix: str, names: Iterable[str], watch: Watch) -> Iterator[None]:
    """Call watch(key, input [n, K]) for every input of the named layers, once for layers that share it."""
    keys = {input_key(name): name for name in reversed(list(names))}
    handles = []
    for key, name in keys.items():

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], key: str = key) -> None:
            if inputs[0].numel():
                watch(key, inputs[0].reshape(-1, inputs[0].shape[-1]))

        handles.append(layer.get_submodule(name.removeprefix(prefix)).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(sums: dict[str, Tensor], key: str, value: Tensor) -> None:
    if key in sums:
        sums[key] += value
    else:
        sums[key] = value
