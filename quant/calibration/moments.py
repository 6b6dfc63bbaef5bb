"""Second moments of layers' inputs over the calibration rows.

    moments = measure(decoder, 3, layer, batches, names)
    moments.hessian("...experts.5.gate_proj"), moments.tokens["...experts.5.gate_proj"]

An expert's inputs are those of the tokens routed to it, as the model scales them: routed-only cost. K input channels,
n tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn

from quant.architectures import EXPERT_BANK
from quant.calibration.decoder import Decoder
from quant.calibration.samples import Kept, most_tokens
from quant.calibration.stages import input_key

Watch = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Input:
    """What entered a layer in one batch: values [n, K] of the tokens rows [n]; rows is None where it is all of them."""

    value_nK: Tensor
    rows_n: Tensor | None


@dataclass
class Moments:
    """Sums of x x^T and token counts, by `input_key`; those of all experts of a bank together by the bank's name."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)
    """Sums of (y - x) x^T: y is the input of the same token in the unquantised model, x itself where that model sends
    the token to another expert."""
    tokens: dict[str, int] = field(default_factory=dict)
    banks: dict[str, Tensor] = field(default_factory=dict)
    bank_tokens: dict[str, int] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    """Inputs of gate and up projections, where the method samples them."""

    def add(self, key: str, found: Input, exact: Input | None, *, summed: bool, sampled: bool = False) -> None:
        """Take in the input of one batch, and that of the unquantised model."""
        input_nK = found.value_nK.float()
        if sampled:
            self.kept.setdefault(key, Kept(most_tokens(input_nK.shape[1]))).add(found.value_nK)
        self.tokens[key] = self.tokens.get(key, 0) + len(input_nK)
        bank = None if key.endswith(".down_proj") else bank_of(key)
        if summed or bank is not None:
            square_KK = square(input_nK)
        if bank is not None:
            _add(self.banks, bank, square_KK.clone())
            self.bank_tokens[bank] = self.bank_tokens.get(bank, 0) + len(input_nK)
        if summed:
            _add(self.sums, key, square_KK)
            if exact is not None:
                both_nK, exact_nK = _same_tokens(found.rows_n, input_nK, exact)
                _add(self.shifts, key, (exact_nK - both_nK).T @ both_nK)

    def hessian(self, key: str, columns: int) -> Tensor:
        """The mean of x x^T [K, K], fp32, drawn towards a prior worth K tokens where an expert met few.

        (n H + K P) / (n + K), with P the mean over the tokens of all experts for inputs that the experts share (gate,
        up), and a multiple of the identity with the trace of H for an expert's own inner channels (down).
        """
        count = self.tokens[key]
        mean_KK = self.sums[key] / count
        if self._weight(key, columns) == count:
            return mean_KK
        if key.endswith(".down_proj"):
            prior_KK = torch.eye(columns) * mean_KK.diagonal().mean()
        else:
            prior_KK = self.banks[bank_of(key)] / self.bank_tokens[bank_of(key)]
        return (count * mean_KK + columns * prior_KK) / (count + columns)

    def shift(self, key: str, columns: int) -> Tensor:
        """The mean of (y - x) x^T [K, K], fp32, with the same prior tokens, which have none."""
        if key not in self.shifts:
            return torch.zeros(columns, columns)
        return self.shifts[key] / self._weight(key, columns)

    def _weight(self, key: str, columns: int) -> int:
        """Tokens that a mean is taken over, those of the prior included."""
        blended = bank_of(key) is not None and self.tokens[key] < FEW * columns
        return self.tokens[key] + (columns if blended else 0)


def square(input_nK: Tensor) -> Tensor:
    """x^T x [K, K], of whose two equal halves one is worked out."""
    columns = input_nK.shape[1]
    square_KK = input_nK.new_empty(columns, columns)
    for start in range(0, columns, BLOCK):
        rows_BK = input_nK[:, start : start + BLOCK].T @ input_nK[:, start:]
        square_KK[start : start + BLOCK, start:] = rows_BK
        square_KK[start + BLOCK :, start : start + BLOCK] = rows_BK[:, BLOCK:].T
    return square_KK


def _same_tokens(rows_n: Tensor | None, input_nK: Tensor, exact: Input) -> tuple[Tensor, Tensor]:
    """The inputs of tokens that both models have here, fp32: ours, and the unquantised model's."""
    if rows_n is None or exact.rows_n is None:
        return input_nK, exact.value_nK.float()
    exact_nK = exact.value_nK[torch.isin(exact.rows_n, rows_n)].float()
    return input_nK[torch.isin(rows_n, exact.rows_n)], exact_nK


BLOCK = 128
FEW = 4  # times K tokens: an expert that met more is taken at its word


def bank_of(name: str) -> str | None:
    """The bank an expert's layer belongs to; None for other layers."""
    found = EXPERT_BANK.match(name)
    return found["bank"] if found else None


@dataclass(frozen=True)
class Reference:
    """The same rows in the unquantised model: what enters this decoder layer there, and the layer as it was."""

    batches: Iterable[Tensor]
    unquantised: Callable[[], AbstractContextManager[None]]
    """Puts the unquantised weights into the layer for as long as it is open."""
    put: Callable[[Tensor], None] | None = None
    """Takes what leaves the layer there, batch after batch."""


@torch.no_grad()
def measure(
    decoder: Decoder,
    index: int,
    layer: nn.Module,
    batches: Iterable[Tensor],
    names: Iterable[str],
    *,
    summed: Iterable[str] | None = None,
    reference: Reference | None = None,
    sampled: bool = False,
) -> Moments:
    """Run rows through a decoder layer and take the moments of the inputs of the named layers.

    summed: the keys whose sums are kept (all); the sums of banks and the counts are always of all. With a reference,
    also how far inputs are from those of the unquantised model. sampled: keep some inputs of gate and up projections.
    """
    moments = Moments()
    names = list(names)
    kept = {input_key(name) for name in names} if summed is None else set(summed)
    prefix = f"{decoder.prefix}.{index}."
    for hidden_BTH, exact_BTH in zip(batches, repeat(None) if reference is None else reference.batches, strict=False):
        run = partial(_inputs, decoder, index, layer, names=names, prefix=prefix)
        seen = run(hidden_BTH)
        exact: dict[str, Input] = {}
        if reference is not None:
            with reference.unquantised():
                exact = run(exact_BTH, put=reference.put)
        for key, found in seen.items():
            sample = sampled and key in kept and key.endswith("gate_proj")
            moments.add(key, found, exact.get(key), summed=key in kept, sampled=sample)
    return moments


class Enough(Exception):
    """A layer has met all inputs that were asked for: what it makes of them does not matter."""


def _inputs(
    decoder: Decoder,
    index: int,
    layer: nn.Module,
    hidden_BTH: Tensor,
    *,
    names: list[str],
    prefix: str,
    put: Callable[[Tensor], None] | None = None,
) -> dict[str, Input]:
    """Every input a batch makes, by key. Where nobody takes the layer's output the run ends with the last of them."""
    values: dict[str, Tensor] = {}
    missing = {input_key(name) for name in names}

    def watch(key: str, value_nK: Tensor) -> None:
        values[key] = value_nK
        missing.discard(key)
        if not missing and put is None:
            raise Enough

    with watching(layer, prefix, names, watch), routing(layer, prefix) as scores, suppress(Enough):
        output_BTH = decoder.run(index, layer, hidden_BTH)
        if put is not None:
            put(output_BTH)
    return {key: Input(value, _rows(key, scores)) for key, value in values.items()}


def _rows(key: str, scores: dict[str, Tensor]) -> Tensor | None:
    bank = bank_of(key)
    if bank is None or bank not in scores:
        return None
    expert = int(key.removeprefix(f"{bank}.").partition(".")[0])
    return scores[bank][:, expert].nonzero().squeeze(1)


@contextmanager
def routing(layer: nn.Module, prefix: str) -> Iterator[dict[str, Tensor]]:
    """The scores [T, E] that the layer's routers give, by the name of their bank of experts."""
    scores: dict[str, Tensor] = {}
    handles = []
    for name, module in layer.named_modules():
        if name.endswith(".router"):
            bank = f"{prefix}{name.removesuffix('.router')}.experts"

            def hook(module: nn.Module, inputs: tuple, output: tuple, bank: str = bank) -> None:
                scores[bank] = output[0]

            handles.append(module.register_forward_hook(hook))
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()


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
