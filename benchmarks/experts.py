"""Sparse experts against transformers' own Llama 4 MoE layer and DeepSpeed AutoEP's, forward and backward, one thread.

    OMP_NUM_THREADS=1 python benchmarks/experts.py [--rounds 5]

Same process, interleaved, random weights and data. Times are CPU seconds of the one thread, so that other programs on
the machine count less. Prints medians, spread and ratios; writes benchmarks/results/experts.json.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from herd.llama4.expert_parallel import install_preset
from herd.llama4.experts import use_sparse_experts
from herd.llama4.specs import SPECS
from herd.run import bf16_products
from herd.run.deepspeed_config import autoep_section
from herd.run.files import write_atomic

RESULTS = Path(__file__).parent / "results" / "experts.json"
TOKENS, HIDDEN, INTERMEDIATE = 2048, 256, 512
TARGETS = {16: 8.0, 128: 30.0}  # times faster than transformers
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPREAD_OF_WEIGHTS = 0.05
QUICK_RUNS = 5  # runs of each sparse form for one of transformers', which takes seconds
WARM_UP = QUICK_RUNS  # turns that are not counted
PEAK_SIDE = 1024


class Model(nn.Module):
    """A whole model as AutoEP's parser expects it, with one MoE layer at model.layers.0.feed_forward."""

    def __init__(self, moe: nn.Module, config: Any) -> None:
        super().__init__()
        self.config = config
        layer = nn.Module()
        layer.feed_forward = moe
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([layer])


def make_layers(experts: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the same weights in transformers' layer, ours and AutoEP's (all experts on this rank)."""
    config = SPECS["scout-nano"].config(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=experts, num_experts_per_tok=1
    )
    dense = Llama4TextMoe(config)
    for parameter in dense.parameters():
        parameter.data = (torch.randn_like(parameter) * SPREAD_OF_WEIGHTS).to(dtype)
    sparse = use_sparse_experts(nn.ModuleList([copy.deepcopy(dense)]))[0]
    spread = Model(copy.deepcopy(dense), config)
    autoep = AutoEP(spread, parse_autoep_config(autoep_section(1)))
    autoep.replace_moe_layers(autoep.ep_parser(), ep_size=1, ep_rank=0)
    return {"transformers": dense, "sparse": sparse, "autoep": spread.model.layers[0].feed_forward}


def run(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> float:
    """Return the CPU seconds of one forward and backward."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    start = time.thread_time()
    layer(x)[0].backward(gradient)
    return time.thread_time() - start


def measure_peak(dtype: torch.dtype) -> float:
    """Return FLOP/s of the best of several square matrix products."""
    a, b = (torch.randn(PEAK_SIDE, PEAK_SIDE).to(dtype) for _ in range(2))
    return 2 * PEAK_SIDE**3 / min(timed(lambda: torch.mm(a, b)) for _ in range(10))


def timed(action: Callable[[], Any]) -> float:
    """Return the CPU seconds `action` takes."""
    start = time.thread_time()
    action()
    return time.thread_time() - start


def count_flops(experts: int) -> float:
    """Return FLOPs of the sparse layer's products, forward and backward: one routed and one shared expert a token."""
    return 3 * 2 * TOKENS * (2 * 3 * HIDDEN * INTERMEDIATE + HIDDEN * experts)


def summarise(seconds: list[float]) -> dict[str, float]:
    """Return median and quartiles in milliseconds."""
    low, middle, high = statistics.quantiles([1e3 * s for s in seconds], n=4)
    return {"median_ms": round(middle, 2), "q1_ms": round(low, 2), "q3_ms": round(high, 2), "runs": len(seconds)}


def compare(experts: int, dtype_name: str, rounds: int) -> dict[str, Any]:
    """Time the three layers in turn and return medians, ratios and the distance to the floor."""
    dtype = DTYPES[dtype_name]
    layers = make_layers(experts, dtype)
    gradient = torch.randn(TOKENS, HIDDEN).to(dtype)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(rounds * QUICK_RUNS + WARM_UP):
        # New tokens every time, as in training: each batch is routed in its own way.
        x = torch.randn(1, TOKENS, HIDDEN).to(dtype)
        for name in ("sparse", "autoep"):
            seconds[name].append(run(layers[name], x, gradient))
        if turn % QUICK_RUNS == 0:
            seconds["transformers"].append(run(layers["transformers"], x, gradient))
    seconds = {name: values[1 if name == "transformers" else WARM_UP :] for name, values in seconds.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    floor = count_flops(experts) / measure_peak(dtype)
    case = {
        "experts": experts,
        "dtype": dtype_name,
        **{name: summarise(values) for name, values in seconds.items()},
        "times_faster_than_transformers": round(median["transformers"] / median["sparse"], 1),
        "target": TARGETS[experts],
        "times_faster_than_autoep": round(median["autoep"] / median["sparse"], 2),
        "floor_ms": round(1e3 * floor, 2),
        "over_floor": round(median["sparse"] / floor, 2),
    }
    print_line(case)
    return case


def print_line(case: dict[str, Any]) -> None:
    """Print one row of the table."""
    ours = case["sparse"]
    print(
        f"{case['experts']:>7} {case['dtype']}  {case['transformers']['median_ms']:>12.1f} "
        f"{case['autoep']['median_ms']:>8.1f} {ours['median_ms']:>8.1f}  ({ours['q1_ms']:.1f}..{ours['q3_ms']:.1f})"
        f"{case['times_faster_than_transformers']:>10.1f}x ({case['target']:.0f}x)"
        f"{case['times_faster_than_autoep']:>12.2f}x{case['over_floor']:>11.2f}x",
        flush=True,
    )


def main() -> int:
    """Run every case, print a line for each and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=5, help="runs of transformers' layer; the others run 5 times as often"
    )
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    bf16_products.install()
    torch.manual_seed(0)
    install_preset()
    print(f"{TOKENS} tokens, hidden {HIDDEN}, intermediate {INTERMEDIATE}, top-1, forward + backward, CPU milliseconds")
    print("experts dtype  transformers   autoep   sparse  (quartiles)      faster (target)  vs autoep  over floor")
    cases = [compare(experts, dtype_name, rounds) for experts in TARGETS for dtype_name in DTYPES]
    result = {
        "tokens": TOKENS,
        "hidden": HIDDEN,
        "intermediate": INTERMEDIATE,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "cases": cases,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
