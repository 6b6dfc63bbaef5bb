"""One bf16 model in memory whose groups of layers take the values of any choice, in place.

model = MixedModel(problem)
model.set({"model.layers.0.feed_forward.experts": "int4-g64", ...})      # what changes is read and rounded again
model(input_ids=...)
"""

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from quant.allocations import BF16
from quant.architectures import assemble
from quant.loading import round_inputs, route_experts
from quant.methods.rtn import Rtn
from quant.plans import Layer, make_plan
from quant.quantized import compress_layer
from quant.ranges import RangeBook
from sweeps.bits.problem import ANY, Allocation, Problem


class MixedModel(nn.Module):
    """Starts with every group in bf16. Weights are rounded to nearest, activations as the choice's format says."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self._problem = problem
        self._plain = make_plan(problem.source, ANY)
        self._layers: dict[str, Layer] = {layer.name: layer for layer in self._plain.layers}
        self._ranges = {label: RangeBook(plan, problem.source) for label, plan in problem.plans.items()}
        state = {name: self._plain.read_kept(problem.source, name) for name in self._plain.kept}
        state |= {f"{name}.weight": self._weight(name) for name in self._layers}
        self.model = route_experts(assemble(self._plain.config, state)).eval().requires_grad_(False)
        self.config = self.model.config
        self._now = problem.uniform(BF16)
        self._roundings: dict[str, RemovableHandle] = {}

    def forward(self, **inputs: torch.Tensor) -> object:
        return self.model(**inputs)

    def set(self, allocation: Allocation) -> None:
        """Give every group its choice; those that have it already are left alone."""
        for group in self._problem.groups:
            label = allocation[group.name]
            if label != self._now[group.name]:
                for name in group.layers:
                    self._fill(name, label)
                self._now[group.name] = label

    def _fill(self, name: str, label: str) -> None:
        module = self.model.get_submodule(name)
        if (handle := self._roundings.pop(name, None)) is not None:
            handle.remove()
        if label == BF16:
            module.weight.data = self._weight(name)
            return
        plan, layer = self._problem.plans[label], self._layers[name]
        scheme = plan.allocation.schemes[0]
        layer = Layer(layer.name, layer.source, layer.shape, scheme, layer.expert)
        stored = compress_layer(plan, self._problem.source, self._ranges[label], Rtn(), layer)
        module.weight.data = scheme.decompress(stored)
        if (handle := round_inputs(module, scheme.format.input_rounding(stored))) is not None:
            self._roundings[name] = handle

    def _weight(self, name: str) -> torch.Tensor:
        return self._plain.read_layer(self._problem.source, self._layers[name]).to(torch.bfloat16)
