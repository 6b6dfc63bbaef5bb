"""A transformers decoder run one layer at a time, out of a source that may be larger than memory.

    decoder = Decoder(plan, source)
    hidden_BTH = decoder.embed(tokens_BT)
    with decoder.layer(0) as layer:                  # its weights are in memory inside the block only
        hidden_BTH = decoder.run(0, layer, hidden_BTH)

B rows, T tokens, H hidden size. Rows are whole: no padding, so that masks depend on the shape alone.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from herd.run.errors import ConfigError
from quant.architectures import SUPPORTED, architecture, build_skeleton
from quant.loading import route_experts
from quant.plans import Plan
from quant.sources import Source
from quant.units import derive_buffers

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Decoder:
    """The text decoder of a plan's model, its experts one module each and dispatched sparsely."""

    def __init__(self, plan: Plan, source: Source):
        self._plan = plan
        self._source = source
        self._skeleton = route_experts(build_skeleton(plan.config)).eval().requires_grad_(False)
        self.prefix = find_layers(self._skeleton)
        self._layers = {layer.name: layer for layer in plan.layers}
        self._calls: dict[tuple[int, int], list[Call]] = {}

    def __len__(self) -> int:
        return len(self._skeleton.get_submodule(self.prefix))

    def names(self, index: int) -> list[str]:
        """The names of a decoder layer's tensors, as the export has them."""
        layer = self._skeleton.get_submodule(f"{self.prefix}.{index}")
        return [f"{self.prefix}.{index}.{name}" for name in layer.state_dict()]

    @torch.no_grad()
    def embed(self, tokens_BT: Tensor) -> Tensor:
        """What enters the first layer, bf16 [B, T, H]; of the embedding only the rows of these tokens are read."""
        hidden_BTH, _ = self._enter(tokens_BT)
        return hidden_BTH

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A decoder layer with its unquantised weights, as bf16."""
        name = f"{self.prefix}.{index}"
        layer = self._skeleton.get_submodule(name)
        self._fill(layer, f"{name}.")
        try:
            yield layer
        finally:
            layer.to("meta")

    @torch.no_grad()
    def run(self, index: int, layer: nn.Module, hidden_BTH: Tensor) -> Tensor:
        """The layer's output for rows [B, T, H], called as the model's own forward calls it."""
        shape = (hidden_BTH.shape[0], hidden_BTH.shape[1])
        if shape not in self._calls:
            _, self._calls[shape] = self._enter(torch.zeros(shape, dtype=torch.int64))
        positional, named = self._calls[shape][index]
        output = layer(hidden_BTH, *positional, **named)
        return output[0] if isinstance(output, tuple) else output

    def _enter(self, tokens_BT: Tensor) -> tuple[Tensor, list[Call]]:
        """Run the decoder's own forward with its layers replaced by catchers of what they are given."""
        owner = self._skeleton.get_submodule(self.prefix.rpartition(".")[0])
        leaf = self.prefix.rpartition(".")[2]
        layers = getattr(owner, leaf)
        catchers = nn.ModuleList(Catcher(layer) for layer in layers)
        rest = [(name, module) for name, module in owner.named_children() if module is not layers]
        for name, module in rest:
            if module is not self._embedding:
                self._fill(module, f"{self.prefix.rpartition('.')[0]}.{name}.")
        setattr(owner, leaf, catchers)
        try:
            owner(inputs_embeds=self._look_up(tokens_BT), use_cache=False)
        finally:
            setattr(owner, leaf, layers)
            for _, module in rest:
                module.to("meta")
        self._check_chain(catchers)
        return catchers[0].hidden, [catcher.call for catcher in catchers]

    @property
    def _embedding(self) -> nn.Module:
        return self._skeleton.get_input_embeddings()

    def _look_up(self, tokens_BT: Tensor) -> Tensor:
        embedding = self._embedding
        name = next(name for name, module in self._skeleton.named_modules() if module is embedding)
        # As large as the table, but pages that are never written take no memory.
        weight_VH = torch.empty(embedding.weight.shape, dtype=torch.bfloat16)
        used_U = tokens_BT.unique()
        weight_VH[used_U] = self._source.read_rows(f"{name}.weight", used_U).to(torch.bfloat16)
        derive_buffers(self._skeleton, embedding)
        return torch.func.functional_call(embedding, {"weight": weight_VH}, (tokens_BT,))

    def _check_chain(self, catchers: nn.ModuleList) -> None:
        for before, after in pairwise(catchers):
            if after.hidden is not before.hidden:
                raise ConfigError(
                    f"{architecture(self._plan.config)} changes what passes between its layers, which a calibrated "
                    f"method cannot follow; use method rtn or hqq (calibrated methods: {SUPPORTED})"
                )

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Give every parameter its value, quantised layers' included, and every derived buffer too."""
        for name, parameter in list(module.named_parameters()):
            owner = module.get_submodule(name.rpartition(".")[0])
            full = prefix + name
            layer = self._layers.get(full.removesuffix(".weight"))
            if layer is not None and full.endswith(".weight"):
                value = self._plan.read_layer(self._source, layer).to(torch.bfloat16)
            else:
                value = self._plan.read_kept(self._source, full)
            filled = nn.Parameter(value, requires_grad=False)
            filled._is_hf_initialized = True  # transformers' initialisers leave it alone
            assert filled.shape == parameter.shape, full
            setattr(owner, name.rpartition(".")[2], filled)
        for name, _ in list(module.named_buffers()):
            if prefix + name in self._plan.kept:
                owner = module.get_submodule(name.rpartition(".")[0])
                owner.register_buffer(name.rpartition(".")[2], self._plan.read_kept(self._source, prefix + name))
        derive_buffers(self._skeleton, module)


class Catcher(nn.Module):
    """Stands in for a decoder layer: remembers how it was called and returns its input."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule

    def forward(self, hidden: Tensor, *positional: Any, **named: Any) -> Tensor:
        self.__dict__["hidden"] = hidden
        self.__dict__["call"] = (positional, named)
        return hidden

    def __getattr__(self, name: str) -> Any:
        """Facts the model reads off its layers, such as the kind of attention."""
        return getattr(self.__dict__["_layer"], name)


def find_layers(model: nn.Module) -> str:
    """Name of the ModuleList of decoder layers; ConfigError when there is none or more than one."""
    depth = model.config.get_text_config().num_hidden_layers
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and re.search(r"(^|\.)(layers|h|blocks)$", name)
        and not re.search(r"(^|\.)(vision|audio)", name)
    ]
    if len(found) != 1:
        kind = type(model).__name__
        raise ConfigError(
            f"{kind}: {len(found)} lists of {depth} decoder layers found, calibration needs one; use method rtn or hqq"
        )
    return found[0]
