"""Coordinate checks: mean sizes of activations over width and depth, after a few steps at a large rate.

rows = check(bench, stop)          # one Coordinate a direction, parametrisation, size, seed, step and kind of module

Under good rules they neither grow nor fade with size (Yang et al. 2022, arXiv 2203.03466, appendix D.1).
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Llama4ForCausalLM

from herd.run.errors import Interrupted
from sweeps.stopping import Stop
from sweeps.transfer.bench import Arm, Bench, cross_entropy
from sweeps.transfer.settings import Along

KINDS = {
    "q_proj": "queries",
    "k_proj": "keys",
    "v_proj": "values",
    "o_proj": "attention",
    "router": "router",
    "experts": "experts",
    "shared_expert": "shared expert",
    "feed_forward": "dense FFN",
    "norm": "residual stream",
    "lm_head": "logits",
}
"""Leaf of a module's name -> what its activation is called; of the final norm, what goes into it."""
BRANCHES = ("attention", "experts", "shared expert", "dense FFN")


@dataclass(frozen=True)
class Coordinate:
    along: Along
    ruled: bool
    factor: int
    seed: int
    step: int
    """Optimiser steps made before; 0: as drawn."""
    kind: str
    size: float
    """Mean |x| over elements and layers. Of a branch before the factor that the rules fold into its last matrix."""
    moved: float
    """Mean |x - x at step 0|, the same way."""


def check(bench: Bench, stop: Stop) -> list[Coordinate]:
    """Measure all sizes, under the rules and without. Raises Interrupted when asked to stop."""
    settings = bench.settings
    found = []
    for along, grid in settings.coordinates.grids.items():
        for factor, size in zip(grid.factors, grid.sizes(along), strict=True):
            for ruled in (True, False)[: 2 if grid.standard else 1]:
                for seed in range(settings.coordinates.seeds):
                    arm = Arm(grid.base, size, ruled)
                    for step, kinds in enumerate(_trajectory(bench, arm, seed, stop)):
                        found += [
                            Coordinate(along, ruled, factor, seed, step, kind, *sizes) for kind, sizes in kinds.items()
                        ]
    return found


def _trajectory(bench: Bench, arm: Arm, seed: int, stop: Stop) -> list[dict[str, tuple[float, float]]]:
    """(size, moved) by kind, before the first step and after each. The rate is constant and nothing is clipped."""
    settings = bench.settings.coordinates
    model, optimizer = bench.start(arm, seed=seed)
    rows = bench.rows[seed]
    (probe,) = rows.take(settings.steps, rows=settings.rows, micro_rows=settings.rows, rank=0, world=1)
    unfold = (arm.size.depth / arm.base.depth) ** bench.settings.depth_exponent if arm.ruled else 1.0
    first: dict[str, list[torch.Tensor]] = {}
    found = []
    for step in range(settings.steps + 1):
        if stop.asked:
            raise Interrupted("")
        with torch.no_grad():
            seen = activations(model, lambda: cross_entropy(model, probe))
        first = first or seen
        found.append(
            {
                kind: tuple(
                    (unfold if kind in BRANCHES else 1.0) * _mean_size(values)
                    for values in (seen[kind], [a - b for a, b in zip(seen[kind], first[kind], strict=True)])
                )
                for kind in seen
            }
        )
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * group["lr_factor"]
        (batch,) = rows.take(step, rows=settings.rows, micro_rows=settings.rows, rank=0, world=1)
        cross_entropy(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found


def activations(model: Llama4ForCausalLM, forward: Callable[[], object]) -> dict[str, list[torch.Tensor]]:
    """What the modules of KINDS give during `forward`, by kind, one tensor a module."""
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)

    def keep(kind: str) -> Callable[[nn.Module, tuple, object], None]:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            value = args[0] if kind == "residual stream" else output
            value = value[1] if isinstance(value, tuple) else value  # a router's second output is its logits
            seen[kind].append(value.detach().float().clone())

        return hook

    handles = []
    for name, module in model.named_modules():
        kind = KINDS.get(name.rpartition(".")[2])
        is_moe = name.endswith("feed_forward") and hasattr(module, "experts")
        if kind is not None and not is_moe:
            handles.append(module.register_forward_hook(keep(kind)))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return dict(seen)


def _mean_size(values: list[torch.Tensor]) -> float:
    return sum(value.abs().mean().item() for value in values) / len(values)
