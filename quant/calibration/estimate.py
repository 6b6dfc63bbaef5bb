"""What a command will take, before it starts: memory, time, bytes.

estimate = foresee(plan, method, rows=128, row_tokens=256, counting=512, memory_bytes=4 * 10**9)
estimate.peak_bytes, estimate.seconds
"""

import re
import time
from dataclasses import dataclass
from math import prod

import torch

from quant.architectures import EXPERT_BANK, bf16_bytes
from quant.calibration.moments import bank_of
from quant.calibration.rows import BATCH_TOKENS
from quant.calibration.samples import PAIR, most_tokens
from quant.calibration.stages import input_key, stages
from quant.calibration.walk import WEIGHTS, input_bytes, working_bytes
from quant.memory import fits
from quant.methods.gated import ROUNDS
from quant.methods.method import Method
from quant.methods.refinement import BLOCK
from quant.plans import Plan, header_bytes

PROCESS_BYTES = 750 * 10**6  # Python with torch and transformers, and what they hold while they compute
GATED_PRODUCTS = 8  # of sampled inputs and a layer's weights, beside those within blocks of columns
GATED_SLOWER = 5  # these products, thin ones, than the square one that is timed: 33 s were foreseen where 85 passed
GATED_STEP_S = 25e-6  # of one weight of an expert bank's gates, in a chunk of the rows that usually move at once
SEARCH_NS = 40  # of one weight's scale, on one core


@dataclass(frozen=True)
class Estimate:
    peak_bytes: int
    """Of the quantising process, which also works out what the export must compute."""
    seconds: float
    gate_bytes: int
    """Of the gate's process: the model, or one layer of it, packed and unpacked."""
    whole: bool
    """Both hold the model at once for the check, not one layer."""


def foresee(plan: Plan, method: Method, *, rows: int, row_tokens: int, counting: int, memory_bytes: int) -> Estimate:
    """Memory and time of quantising. counting: rows run through the whole model once to count tokens of experts."""
    layer_bytes, hessian_bytes = _largest_layer(plan, method)
    model_bytes = bf16_bytes(plan.config)
    whole = fits(model_bytes)
    checked = model_bytes if whole else max(layer_bytes, *map(header_bytes, plan.kept.values()))
    gate_bytes = PROCESS_BYTES + int(checked * (1 + plan.bits_per_quantised_weight / 16))
    largest = max(prod(layer.shape) for layer in plan.layers)
    search_s = plan.quantised_weights * SEARCH_NS * 1e-9 / torch.get_num_threads()
    if not method.calibrated:
        return Estimate(PROCESS_BYTES + max(16 * largest, checked), search_s, gate_bytes, whole)
    streams = 2 if method.corrects else 1
    held = streams * layer_bytes + min(memory_bytes, hessian_bytes) + 64 * BATCH_TOKENS * _width(plan)
    tokens = rows * row_tokens
    passes = streams * len(stages(layer.name for layer in plan.layers)) + 1
    share = _active_share(plan)
    forward = 2 * share * plan.all_weights * (tokens * passes + counting * row_tokens)
    solving = 0.0
    inputs: dict[str, int] = {}
    stepping: dict[str, float] = {}
    for layer in plan.layers:
        width, columns = layer.shape
        met = tokens * (_expert_share(plan) if EXPERT_BANK.match(layer.name) else 1)
        if input_key(layer.name) not in inputs:
            inputs[input_key(layer.name)] = columns
            solving += 2 * columns**2 * met * streams + 3 * columns**3
        solving += 14 * width * columns**2
        if method.samples_inputs and layer.name.endswith(PAIR):
            products = (BLOCK + GATED_PRODUCTS) * columns + 2 * width
            solving += 2 * ROUNDS * GATED_SLOWER * products * min(met, most_tokens(columns)) * width
            stepping[bank_of(layer.name) or layer.name] = ROUNDS * GATED_STEP_S * width * columns
    seconds = search_s + 2 * sum(stepping.values()) + (forward + solving) / _flops()
    return Estimate(PROCESS_BYTES + max(held, checked), seconds, gate_bytes, whole)


def _width(plan: Plan) -> int:
    return plan.config.get_text_config().hidden_size


def _expert_share(plan: Plan) -> float:
    """Share of the tokens that one expert meets on average."""
    text = plan.config.get_text_config()
    return getattr(text, "num_experts_per_tok", 1) / max(1, getattr(text, "num_local_experts", 1))


def _active_share(plan: Plan) -> float:
    """Share of the weights that a token meets."""
    experts = sum(prod(layer.shape) for layer in plan.layers if EXPERT_BANK.match(layer.name))
    return 1 - experts / plan.all_weights * (1 - _expert_share(plan))


def _largest_layer(plan: Plan, method: Method) -> tuple[int, int]:
    """Bytes of the weights of the largest decoder layer in bf16, and of the largest stage's Hessians and weights."""
    depth = plan.config.get_text_config().num_hidden_layers
    weights: dict[str, int] = {}
    needed: dict[tuple[str, int], int] = {}
    for layer in plan.layers:
        block = _block(layer.name)
        weights[block] = weights.get(block, 0) + 2 * prod(layer.shape)
        stage = (block, int(layer.name.endswith("down_proj")))
        rows, columns = layer.shape
        needed[stage] = needed.get(stage, 0) + input_bytes(columns, method) + 4 * WEIGHTS * rows * columns
    rest = 2 * sum(prod(shape) for name, (_, shape) in plan.kept.items() if _block(name)) // depth
    return max(weights.values()) + rest, max(needed.values()) + max(working_bytes(one, method) for one in plan.layers)


def _block(name: str) -> str:
    """The decoder layer a tensor belongs to; empty for those outside."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else ""


def _flops() -> float:
    """Multiply-adds a second of this machine, times two, from one short product of matrices."""
    matrix = torch.ones(768, 768)
    matrix @ matrix
    started = time.monotonic()
    matrix @ matrix
    return 2 * 768**3 / max(time.monotonic() - started, 1e-6)
