"""What a decoder's parts put out while it runs: its layers, the projections of their attention, their routers.

    places = places_of(model)                              # ("hidden", 3), ("q", 3), ..., ("router", 3) -> where it is
    recorder = Recorder(model, [("hidden", 3), ("q", 0)])
    with recorder.recording() as shown: model(input_ids=...)

Any transformers decoder; layers are counted from 0. Outside `recording` there is no hook on the model.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from herd.llama4.balance import routers
from teachers.targets import decoder_of

Kind = Literal["hidden", "q", "k", "v", "router"]
Place = tuple[Kind, int]
"""What, and of which decoder layer."""


@dataclass(frozen=True)
class Source:
    """A module, and which of its outputs it is."""

    module: nn.Module
    index: int

    @property
    def width(self) -> int:
        """Numbers a token; of projections and routers, whose weight is [width, ...]."""
        return self.module.weight.shape[0]


def places_of(model: PreTrainedModel) -> dict[Place, Source]:
    """Every place this model has. A model with fused attention has no q, k, v; one without experts no router."""
    decoder = decoder_of(model) or model
    count = model.config.get_text_config().num_hidden_layers
    layers = next((m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count), ())
    index_of = {id(module): index for module, index in routers(model)}
    places: dict[Place, Source] = {}
    for number, layer in enumerate(layers):
        places["hidden", number] = Source(layer, 0)
        for name, module in layer.named_modules():
            kind = name.rpartition(".")[2].removesuffix("_proj")
            if kind in ("q", "k", "v"):
                places.setdefault((kind, number), Source(module, 0))
            elif id(module) in index_of:
                places["router", number] = Source(module, index_of[id(module)])
    return places


class Recorder:
    """Records some places of a model. Make it after `deepspeed.initialize`, which may replace modules."""

    def __init__(self, model: PreTrainedModel, places: Iterable[Place]) -> None:
        found = places_of(model)
        self._sources = {place: found[place] for place in places}

    @contextmanager
    def recording(self, *, detached: bool = False) -> Iterator[dict[Place, torch.Tensor]]:
        """The last output of each place, filled while the model runs inside; in its graph unless `detached`."""
        shown: dict[Place, torch.Tensor] = {}
        handles = [
            source.module.register_forward_hook(_keep(shown, place, source.index, detached))
            for place, source in self._sources.items()
        ]
        try:
            yield shown
        finally:
            for handle in handles:
                handle.remove()


def _keep(
    shown: dict[Place, torch.Tensor], place: Place, index: int, detached: bool
) -> Callable[[nn.Module, tuple, torch.Tensor | tuple], None]:
    def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        tensor = output[index] if isinstance(output, tuple) else output
        shown[place] = tensor.detach() if detached else tensor

    return hook
