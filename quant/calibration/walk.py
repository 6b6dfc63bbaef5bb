"""Quantises a model decoder layer by decoder layer, each calibrated on what the quantised layers before it put out.

    walk = Walk(plan, source, method, rows, ledger, memory_bytes=4 * 10**9)
    walk.advance(3)                                   # layers 0 .. 3 are finished now
    ledger.tensors(3)["model.layers.3.mlp.up_proj.weight_packed"]

In memory: one decoder layer, the Hessians of as many of its inputs as memory_bytes holds, one batch of rows.
E layers of one shape, N output channels, K input channels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibration.activations import Activations
from quant.calibration.coverage import treatment
from quant.calibration.decoder import Decoder
from quant.calibration.ledger import Ledger
from quant.calibration.moments import Moments, Reference, bank_of, measure
from quant.calibration.rows import CalibrationRows
from quant.calibration.samples import PAIR, activation_of, most_tokens
from quant.calibration.stages import input_key, stages
from quant.memory import give_back
from quant.methods.awq import fold_hessian
from quant.methods.folds import find_folds
from quant.methods.method import FeedForward, Method, Rounded, layer_of
from quant.methods.names import GRID_SCHEMES
from quant.methods.targets import corrected
from quant.plans import Layer, Plan
from quant.schemes import Scheme
from quant.sources import Source


class Walk:
    def __init__(
        self, plan: Plan, source: Source, method: Method, rows: CalibrationRows, ledger: Ledger, *, memory_bytes: int
    ):
        self.decoder = Decoder(plan, source)
        self._plan = plan
        self._method = method
        self._ledger = ledger
        self._memory_bytes = memory_bytes
        self._batches = rows.batches()
        width = plan.config.get_text_config().hidden_size
        shapes = [(*batch.shape, width) for batch in self._batches]
        self._activations = Activations(ledger.folder, "hidden", shapes)
        self._exact = Activations(ledger.folder, "exact", shapes) if method.corrects else None
        self._of: dict[int, list[Layer]] = {}
        for layer in plan.layers:
            index = self.layer_of(layer.name)
            if index is not None:
                self._of.setdefault(index, []).append(layer)

    def layers_of(self, index: int) -> list[Layer]:
        """What is quantised of a decoder layer."""
        return self._of.get(index, [])

    def layer_of(self, name: str) -> int | None:
        """The decoder layer a tensor belongs to; None for those outside."""
        inside = name.startswith(f"{self.decoder.prefix}.")
        return int(name.removeprefix(f"{self.decoder.prefix}.").partition(".")[0]) if inside else None

    def advance(self, index: int) -> None:
        """Finish all layers up to this one."""
        if self._ledger.finished == 0:
            for states in self._states():
                states.write(0, map(self.decoder.embed, self._batches))
        for each in range(self._ledger.finished, index + 1):
            self._finish(each)

    @torch.no_grad()
    def _finish(self, index: int) -> None:
        last = index + 1 == len(self.decoder)
        with self.decoder.layer(index) as layer:
            block = Block(self, index, layer)
            block.quantise()
            if not last:
                self._pass_on(index, layer, self._activations)
                if self._exact is not None and not block.layers:
                    self._pass_on(index, layer, self._exact)
            self._ledger.add(index, block.tensors, {"inputs": block.inputs})
        for states in self._states():
            states.drop(index)
        give_back()

    def _pass_on(self, index: int, layer: nn.Module, states: Activations) -> None:
        states.write(index + 1, (self.decoder.run(index, layer, hidden_BTH) for hidden_BTH in states.read(index)))

    def _states(self) -> list[Activations]:
        return [states for states in (self._activations, self._exact) if states is not None]


class Block:
    """One decoder layer while it is quantised; its module holds the quantised values afterwards."""

    def __init__(self, walk: Walk, index: int, module: nn.Module):
        self._walk = walk
        self._index = index
        self._module = module
        self._prefix = f"{walk.decoder.prefix}.{index}."
        self.layers = {layer.name: layer for layer in walk.layers_of(index)}
        self.tensors: dict[str, Tensor] = {}
        """Stored tensors of the quantised layers, and kept ones that folding changed."""
        self.inputs: dict[str, dict[str, Any]] = {}
        self._originals: dict[str, Tensor] = {}
        self._rounded: dict[str, Tensor] = {}

    def quantise(self) -> None:
        """Fill `tensors` and `inputs`, and pass on what the unquantised layer puts out, where there are layers."""
        method = self._walk._method
        if method.folds and self.layers:
            # Factors move between stages, so that all of them are measured before anything is rounded.
            moments = self._measure(list(self.layers))
            self.fold(moments)
            self._round(list(self.layers), moments)
            return
        passes = [(names, chunk) for names in stages(self.layers) for chunk in self._chunks(names)]
        for at, (names, chunk) in enumerate(passes):
            first = at == 0 or passes[at - 1][0] is not names
            chosen = [name for name in names if input_key(name) in chunk]
            moments = self._measure(names if first else chosen, chunk, last=at + 1 == len(passes))
            if first:
                banks = moments.banks, moments.bank_tokens  # of all inputs of the stage
            moments.banks, moments.bank_tokens = banks
            self._round(chosen, moments)
            del moments  # before the next are taken

    def _measure(self, names: Sequence[str], keys: Iterable[str] | None = None, *, last: bool = False) -> Moments:
        walk, index = self._walk, self._index
        batches, sampled = walk._activations.read(index), walk._method.samples_inputs
        run = partial(measure, walk.decoder, index, self._module, batches, names, summed=keys, sampled=sampled)
        if walk._exact is None:
            return run()
        passes_on = last and index + 1 < len(walk.decoder)
        with walk._exact.writing(index + 1) if passes_on else nullcontext() as put:
            return run(reference=Reference(walk._exact.read(index), self.unquantised, put))

    def _chunks(self, names: Sequence[str]) -> list[list[str]]:
        """Inputs whose Hessians, and the weights they are for, are in memory at one time."""
        bytes_of: dict[str, int] = {}
        for name in names:
            rows, columns = self.layers[name].shape
            key = input_key(name)
            once = input_bytes(columns, self._walk._method)
            bytes_of[key] = bytes_of.get(key, once) + 4 * WEIGHTS * rows * columns
        chunks: list[list[str]] = [[]]
        room = self._walk._memory_bytes - max(working_bytes(self.layers[name], self._walk._method) for name in names)
        filled = 0
        for key, needed in bytes_of.items():
            if chunks[-1] and filled + needed > room:
                chunks.append([])
                filled = 0
            chunks[-1].append(key)
            filled += needed
        return chunks

    @contextmanager
    def unquantised(self) -> Iterator[None]:
        """The module as it was read, as long as this is open."""
        for name in self._rounded:
            self._part(name).weight.data = self._originals[name]
        try:
            yield
        finally:
            for name, rounded in self._rounded.items():
                self._part(name).weight.data = rounded

    def _round(self, names: Sequence[str], moments: Moments) -> None:
        method = self._walk._method
        held: dict[tuple[str, ...], Rounded] = {}
        for stack in stacks(names, self.layers, moments.tokens):
            scheme = self.layers[stack[0]].scheme
            if not moments.tokens.get(input_key(stack[0])) or scheme.name not in GRID_SCHEMES:  # to nearest
                self._keep({name: scheme.compress(self._part(name).weight.data) for name in stack}, scheme)
                continue
            columns = self.layers[stack[0]].shape[1]
            hessian_EKK = torch.stack([moments.hessian(input_key(name), columns) for name in stack])
            weight_ENK = torch.stack([self._weight(name) for name in stack])
            if method.corrects:
                shift_EKK = torch.stack([moments.shift(input_key(name), columns) for name in stack])
                weight_ENK = corrected(weight_ENK, hessian_EKK, shift_EKK)
            chosen = Rounded(weight_ENK, hessian_EKK, *method.round(weight_ENK, scheme.grid, hessian_EKK))
            if method.samples_inputs:
                held[tuple(stack)] = chosen
            else:
                self._settle(stack, chosen)
        self._refine(held, moments)
        for stack, chosen in held.items():
            self._settle(stack, chosen)
        for name in names:
            key = input_key(name)
            tokens = moments.tokens.get(key, 0)
            kind = treatment(tokens, self.layers[name].shape[1], expert=bank_of(key) is not None)
            self.inputs[key] = {"tokens": tokens, "treatment": kind}

    def _refine(self, rounded: dict[tuple[str, ...], Rounded], moments: Moments) -> None:
        """Make the codes of gates and of their up projections better, with the inputs that were kept."""
        gate, up = PAIR
        for stack in [stack for stack in rounded if stack[0].endswith(f".{gate}")]:
            other = tuple(name.removesuffix(gate) + up for name in stack)
            if other in rounded and all(input_key(name) in moments.kept for name in stack):
                parts = [self._feed_forward(name.removesuffix(f".{gate}"), moments) for name in stack]
                grid = self.layers[stack[0]].scheme.grid
                pair = self._walk._method.refine(rounded[stack], rounded[other], grid, parts)
                rounded[stack], rounded[other] = pair

    def _feed_forward(self, parent: str, moments: Moments) -> FeedForward:
        gate, up, down = (self._part(f"{parent}.{leaf}") for leaf in (*PAIR, "down_proj"))
        biases = tuple(None if part.bias is None else part.bias.data for part in (gate, up))
        input_nK = moments.kept[f"{parent}.{PAIR[0]}"].inputs()
        return FeedForward(input_nK, down.weight.data, biases, activation_of(self._walk._plan.config))

    def _settle(self, stack: Sequence[str], chosen: Rounded) -> None:
        """Keep the codes of a stack as they are stored."""
        scheme = self.layers[stack[0]].scheme
        made = [scheme.store(codes_NK, layer_of(chosen.parameters, at)) for at, codes_NK in enumerate(chosen.codes_ENK)]
        self._keep(dict(zip(stack, made, strict=True)), scheme)

    def _keep(self, made: Mapping[str, dict[str, Tensor]], scheme: Scheme) -> None:
        """Keep what is stored of layers, and put its values into the module."""
        for name, stored in made.items():
            self.tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
            part = self._part(name)
            self._originals[name], self._rounded[name] = part.weight.data, scheme.decompress(stored)
            part.weight.data = self._rounded[name]

    def fold(self, moments: Moments) -> None:
        """Move factors into norms and up projections, in the module and in the moments."""
        method = self._walk._method
        grid = self._walk._plan.allocation.schemes[0].grid  # all have the same: mixed allocations are not folded
        relative = [name.removeprefix(self._prefix) for name in self.layers]
        for fold in find_folds([name for name, _ in self._module.named_modules()], relative):
            names = [name for leaf in fold.consumers if (name := self._prefix + leaf) in self.layers]
            consumers = []
            measured = [name for name in names if moments.tokens.get(input_key(name))]
            for stack in stacks(measured, self.layers, moments.tokens):
                columns = self.layers[stack[0]].shape[1]
                hessian_EKK = torch.stack([moments.hessian(input_key(name), columns) for name in stack])
                tokens_E = torch.tensor([float(moments.tokens[input_key(name)]) for name in stack])
                consumers.append((torch.stack([self._weight(name) for name in stack]), hessian_EKK, tokens_E))
            if not consumers:
                continue
            factor_K = method.factors(consumers, grid)
            for key in {input_key(name) for name in names} & moments.sums.keys():
                moments.sums[key] = fold_hessian(moments.sums[key], factor_K)
            for bank in {bank_of(name) for name in names if not name.endswith(".down_proj")} & moments.banks.keys():
                moments.banks[bank] = fold_hessian(moments.banks[bank], factor_K)
            self._scale(fold.producer, fold.consumers, factor_K)

    def _scale(self, producer: str, consumers: Iterable[str], factor_K: Tensor) -> None:
        part = self._module.get_submodule(producer)
        weight = part.weight.data
        part.weight.data = (weight / (factor_K[:, None] if weight.ndim == 2 else factor_K)).to(torch.bfloat16)
        if getattr(part, "bias", None) is not None:
            part.bias.data = (part.bias.data / factor_K).to(torch.bfloat16)
            self.tensors[f"{self._prefix}{producer}.bias"] = part.bias.data  # kept, though its layer is quantised
        for name in consumers:
            linear = self._module.get_submodule(name)
            linear.weight.data = (linear.weight.data * factor_K).to(torch.bfloat16)
        for name in (producer, *consumers):
            if self._prefix + name not in self.layers:
                changed = self._module.get_submodule(name).state_dict()
                self.tensors |= {f"{self._prefix}{name}.{leaf}": tensor for leaf, tensor in changed.items()}

    def _part(self, name: str) -> nn.Module:
        return self._module.get_submodule(name.removeprefix(self._prefix))

    def _weight(self, name: str) -> Tensor:
        return self._part(name).weight.data.float()


# Matrices of [K, K] and of [N, K] in fp32 that are held for each layer being worked on, generously: sums, means, damped
# and factored Hessians; weights, targets, codes and errors in two orders.
HESSIANS, WEIGHTS = 8, 10


def input_bytes(columns: int, method: Method) -> int:
    """What is held for one input: its matrices, and in bf16 the tokens a method samples."""
    sampled = 2 * most_tokens(columns) * columns if method.samples_inputs else 0
    return 4 * HESSIANS * columns * columns + sampled


def working_bytes(layer: Layer, method: Method) -> int:
    """What a method holds for a time beside that, for a gate with its up projection."""
    rows, columns = layer.shape
    refined = method.samples_inputs and layer.name.endswith(PAIR)
    return method.working_bytes(most_tokens(columns), rows, columns) if refined else 0


def stacks(names: Iterable[str], layers: dict[str, Layer], tokens: Mapping[str, int]) -> Iterator[list[str]]:
    """Names of one leaf, one shape and one scheme, which are quantised together; those that met no token apart."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        met = tokens.get(input_key(name), 0) > 0
        kind = (met, name.rpartition(".")[2], layers[name].shape, bank_of(name) is not None, layers[name].scheme)
        alike.setdefault(kind, []).append(name)
    yield from alike.values()
