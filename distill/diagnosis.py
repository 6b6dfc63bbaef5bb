"""After a loss that is not finite: name the first parameter, or the first layer's output, that is not.

first_fault(model, forward, batches) -> "parameter model.layers.3... holds NaN"
"""

from collections.abc import Callable

import torch
from torch import nn

from herd.data.batches import Batch

Forward = Callable[[Batch], object]


def first_fault(model: nn.Module, forward: Forward, batches: list[Batch]) -> str:
    """One clause. Parameters are looked at in the model's order; if all are finite, `forward` is run on the batches."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name} holds {_kind(parameter)}"
    for batch in batches:
        fault = _first_output(model, forward, batch)
        if fault is not None:
            return fault
    return (
        "every parameter and every layer's output on this rank is finite: the fault is in the loss or on another rank"
    )


def _first_output(model: nn.Module, forward: Forward, batch: Batch) -> str | None:
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                bad = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
                if bad and not found and not torch.isfinite(tensor).all():
                    found.append(
                        f"all parameters are finite, but the output of {name} is the first with {_kind(tensor)}"
                    )

        return hook

    leaves = [(name, m) for name, m in model.named_modules() if not any(m.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    with torch.no_grad():
        forward(batch)
    for handle in handles:
        handle.remove()
    return found[0] if found else None


def _kind(tensor: torch.Tensor) -> str:
    return "NaN" if torch.isnan(tensor).any() else "Inf"
