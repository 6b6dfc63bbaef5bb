"""A model run unit by unit: a decoder layer, the embedding or the head is in memory only while it computes.

    running = StreamedModel(skeleton, fill)          # fill(unit) gives a unit without storage its values
    logits_BTV = running.logits(input_BT)            # the model's own forward
    running.finish();  running.digests               # sha256 of every tensor of the model's state

B rows, T tokens, V vocabulary.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant.architectures import tied_names
from quant.memory import give_back
from quant.probes import run
from quant.shards import tensor_bytes


@dataclass(frozen=True)
class Unit:
    name: str
    module: nn.Module
    whole: bool
    """With all modules below it; else only with tensors of its own."""

    def state(self) -> dict[str, Tensor]:
        """Its stored tensors by their full names."""
        if self.whole:
            found = self.module.state_dict()
        else:
            found = dict(self.module.named_parameters(recurse=False))
            passing = self.module._non_persistent_buffers_set
            found |= {n: buffer for n, buffer in self.module.named_buffers(recurse=False) if n not in passing}
        prefix = f"{self.name}." if self.name else ""
        return {prefix + name: tensor.detach() for name, tensor in found.items()}

    def place(self, name: str, tensor: Tensor) -> None:
        """Put a tensor where the parameter or buffer of that full name is."""
        path, _, leaf = name.removeprefix(f"{self.name}.").rpartition(".")
        owner = self.module.get_submodule(path)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def drop(self) -> None:
        """Give its memory back."""
        for name, tensor in self.state().items():
            self.place(name, torch.empty_like(tensor, device="meta"))
        give_back()


Fill = Callable[[Unit], None]


class StreamedModel:
    """A model whose parameters are on the meta device and whose derived buffers are not (`derive_buffers`)."""

    def __init__(self, model: PreTrainedModel, fill: Fill):
        self._model = model
        self._fill = fill
        self._units = find_units(model)
        self._tied = {name: model.all_tied_weights_keys[name] for name in tied_names(model)}
        self.digests: dict[str, str] = {}
        for unit in self._units.values():
            unit.module.register_forward_pre_hook(lambda *_, unit=unit: self._enter(unit))
            unit.module.register_forward_hook(lambda *_, unit=unit: unit.drop())

    def logits(self, input_BT: Tensor) -> Tensor:
        """The model's logits [B, T, V]; what its forward reads is digested on the way."""
        # Before the forward, because that may move the tokens to where it finds the embedding's weight.
        embedding = self._model.get_input_embeddings()
        self._enter(next(unit for unit in self._units.values() if unit.module is embedding))
        return run(self._model, input_BT)

    def finish(self) -> None:
        """Digest the units that a forward over text does not reach (those for images)."""
        for unit in self._units.values():
            if any(name not in self.digests for name in unit.state()):
                self._enter(unit)
                unit.drop()

    def _enter(self, unit: Unit) -> None:
        if not any(tensor.is_meta for tensor in unit.state().values()):
            return
        self._fill(unit)
        for name in unit.state().keys() & self._tied.keys():
            unit.place(name, self._shared(self._tied[name]))
        for name, tensor in unit.state().items():
            self.digests[name] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()

    def _shared(self, name: str) -> Tensor:
        """A tensor of another unit, as a head is that shares the embedding's."""
        owner = unit_of(name, self._units)
        self._fill(owner)
        tensor = owner.state()[name]
        owner.drop()
        return tensor


def find_units(model: nn.Module) -> dict[str, Unit]:
    """By name: the entries of the outermost module lists, and every module outside them with tensors of its own."""
    units: dict[str, Unit] = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        above = unit_of(parent, units)
        if above is not None and above.whole:
            continue
        entry = name and isinstance(model.get_submodule(parent), nn.ModuleList)
        unit = Unit(name, module, bool(entry or not list(module.children())))
        if unit.state():
            units[name] = unit
    return units


def unit_of(name: str, units: dict[str, Unit]) -> Unit | None:
    """The unit that a module or a tensor belongs to."""
    while name and name not in units:
        name = name.rpartition(".")[0]
    return units.get(name)


def derive_buffers(model: PreTrainedModel, part: nn.Module) -> None:
    """Work out buffers that are not stored (rotary frequencies, for one) as transformers does on loading, in place."""
    for module in part.modules():
        derived = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in derived:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if derived:
            model._init_weights(module)
