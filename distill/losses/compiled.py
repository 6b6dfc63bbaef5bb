"""Functions of a chunk as one kernel each on a GPU, as they are written on a CPU.

    value_C = fused(function, logits_CV)(logits_CV, ...)      # as fast as the device of logits_CV allows

On a CPU a block stays in a core's cache and eager passes are cheap; a GPU reads memory once for each.
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

Function = Callable[..., Any]


def fused(function: Function, on: torch.Tensor) -> Function:
    """`function` itself for a tensor on the CPU, else what `torch.compile` makes of it."""
    return compiled(function) if on.is_cuda else function


@cache
def compiled(function: Function) -> Function:
    """`function` through inductor, for any sizes; without a compiler itself, after one line on stderr.

    It must be one graph: then nothing has run, and no input is overwritten, when compiling it fails.
    """
    from torch import _dynamo  # a second to import, on GPUs only

    # Each kind of targets, each setting of the loss and a chunk of a single token is a graph of its own.
    many_graphs = _dynamo.config.patch(recompile_limit=64)
    made, working = many_graphs(torch.compile(function, dynamic=True, fullgraph=True)), True

    def call(*arguments: Any, **settings: Any) -> Any:
        nonlocal working
        if working:
            try:
                return made(*arguments, **settings)
            except _dynamo.exc.TorchDynamoException as error:
                working = False
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                print(
                    f"warning: {function.__name__} cannot be compiled and runs slower: {reason}",
                    file=sys.stderr,
                    flush=True,
                )
        return function(*arguments, **settings)

    return call
