"""Decode speed: greedy, one sequence, key-value cache, one token a forward.

speed = time_decoding(model, prompt_1T, tokens=64)      # tokens per second, median of several runs
"""

from statistics import median
from time import perf_counter

import torch
from torch import Tensor

RUNS = 5


@torch.inference_mode()
def decode(model: torch.nn.Module, prompt_1T: Tensor, *, tokens: int) -> tuple[Tensor, float]:
    """(generated ids [tokens], seconds). The prompt's forward, which yields the first token, is not in the seconds."""
    output = model(input_ids=prompt_1T, use_cache=True, logits_to_keep=1)
    generated = [output.logits[:, -1].argmax(-1, keepdim=True)]
    _synchronise(prompt_1T)
    started = perf_counter()
    for _ in range(tokens):
        output = model(input_ids=generated[-1], past_key_values=output.past_key_values, use_cache=True)
        generated.append(output.logits[:, -1].argmax(-1, keepdim=True))
    _synchronise(prompt_1T)
    return torch.cat(generated[:tokens], dim=1)[0], perf_counter() - started


def time_decoding(model: torch.nn.Module, prompt_1T: Tensor, *, tokens: int, runs: int = RUNS) -> float:
    """Tokens per second: median over `runs`, after one shorter run that warms up."""
    decode(model, prompt_1T, tokens=min(tokens, 8))
    return median(tokens / decode(model, prompt_1T, tokens=tokens)[1] for _ in range(runs))


def _synchronise(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize(tensor.device)
