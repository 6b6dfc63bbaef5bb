"""The experts that the routers of a Llama 4 choose, noted in one model and forced upon another: no token moves.

    with routes(exact, record := [], replay=False): exact(ids)
    with routes(rounded, record, replay=True): rounded(ids)      # the same calls in the same order

T tokens, E experts, K experts a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4Router


@contextmanager
def routes(model: nn.Module, record: list[Tensor], *, replay: bool) -> Iterator[None]:
    """Note which experts [T, K] every router chooses, or make it choose what was noted."""
    place = iter(record)

    def hook(module: Llama4Router, inputs: tuple, output: tuple) -> tuple | None:
        logits_TE = output[1]
        if not replay:
            record.append(logits_TE.topk(module.top_k, dim=1).indices)
            return None
        experts_TK = next(place)
        scores_TK = logits_TE.gather(1, experts_TK).float().sigmoid().to(logits_TE.dtype)
        if len(output) == 3:  # sparse experts are told whom they serve
            return scores_TK, logits_TE, experts_TK
        return torch.zeros_like(logits_TE).scatter_(1, experts_TK, scores_TK), logits_TE

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, Llama4Router)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
