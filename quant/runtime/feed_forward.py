"""Llama 4's feed-forward layers over low-bit weights: gate and up fused, and only the experts a token is routed to.

    mlp = Mlp(gate_up, down, activation);  output_TH = mlp.product(hidden_TH)
    route(moe, experts=[mlp, ...], shared=mlp)        # a transformers Llama4TextMoe, in place

T tokens, H hidden, I intermediate, E experts, K experts a token, N = T x K routed rows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from herd.llama4.experts import SparseRouter
from quant.runtime.linears import Linear


class Mlp(nn.Module):
    """down(activation(gate(x)) * up(x)), as transformers' Llama4TextMLP."""

    def __init__(self, gate_up: Linear, down: Linear, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation

    def product(self, hidden_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        gate_TI, up_TI = self.gate_up.product(hidden_TH).chunk(2, 1)
        return self.down.product(self.activation(gate_TI).mul_(up_TI))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.product(hidden.reshape(-1, hidden.shape[-1])).view(hidden.shape)


class RoutedMoe(Llama4TextMoe):
    """Llama4TextMoe that runs each expert on the rows routed to it and leaves the others alone; made by `route`."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(output [T, H], router logits [T, E]), as the class it replaces."""
        hidden_TH = hidden_states.reshape(-1, self.hidden_dim)
        scores_TK, logits_TE, experts_TK = self.router(hidden_TH)
        output_TH = self.shared_expert.product(hidden_TH)
        if experts_TK.numel() == 1:
            return output_TH + self.experts[experts_TK.item()].product(hidden_TH * scores_TK), logits_TE
        expert_N, order_N = experts_TK.flatten().sort(stable=True)
        counts = torch.bincount(expert_N, minlength=self.num_experts).tolist()
        token_N = order_N // self.top_k
        routed_NH = hidden_TH[token_N] * scores_TK.flatten()[order_N, None]
        parts = zip(self.experts, routed_NH.split(counts), token_N.split(counts), strict=True)
        for expert, rows_NH, tokens_N in parts:
            if len(rows_NH):
                output_TH.index_add_(0, tokens_N, expert.product(rows_NH))
        return output_TH, logits_TE


def route(moe: Llama4TextMoe, *, experts: Sequence[Mlp], shared: Mlp) -> None:
    """Make a transformers MoE layer sparse over the given experts, in place; its router keeps weight and hooks."""
    moe.experts, moe.shared_expert = nn.ModuleList(experts), shared
    moe.__class__, moe.router.__class__ = RoutedMoe, SparseRouter
