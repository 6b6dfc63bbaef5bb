"""Sparse experts inside transformers' own Llama 4: each token meets its top-k experts, not all of them.

    model = use_sparse_experts(build("scout-nano", seed=0))

transformers multiplies every token by every expert, a zero score erasing most of it. Here tokens are sorted by expert
and each expert sees its own; values and gradients are the same, the router's included.
"""

# Suffixes: T tokens, K experts a token, N = T x K routed rows, P = N and the padding between experts, E experts,
# H hidden, I intermediate, G = 2 x I.

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.activations import ACT2FN
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextExperts, Llama4TextMoe

from herd.run.errors import ConfigError

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def use_sparse_experts(model: AnyModule) -> AnyModule:
    """Make every Llama4TextMoe inside `model` sparse, in place, and return `model`.

    Only classes are swapped, so names, parameters, hooks and checkpoints stay as they were; doing it twice is harmless
    and a model without such layers comes back untouched. Raises ConfigError for experts whose activation is not SiLU.
    """
    for name, moe in model.named_modules():
        if not isinstance(moe, Llama4TextMoe):
            continue
        if not isinstance(moe.experts.act_fn, type(ACT2FN["silu"])):
            raise ConfigError(f"{name}: hidden_act = {moe.experts.act_fn} has no sparse form; use silu")
        moe.__class__, moe.router.__class__, moe.experts.__class__ = SparseMoe, SparseRouter, SparseExperts
    return model


class SparseMoe(Llama4TextMoe):
    """Llama4TextMoe that sends a token only to its own experts."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Map [..., H] to (output_TH, logits_TE), as the class it replaces does."""
        hidden_TH = hidden.reshape(-1, self.hidden_dim)
        scores_TK, logits_TE, experts_TK = self.router(hidden_TH)
        # The score scales the expert's input and is not detached: this is how the router learns.
        routed_NH = (hidden_TH.unsqueeze(1) * scores_TK.unsqueeze(2)).flatten(0, 1)
        place_N, counts = place_rows(experts_TK.flatten(), self.num_experts, step=_row_step(hidden_TH))
        routed_PH = routed_NH.new_zeros(sum(counts), self.hidden_dim).index_copy(0, place_N, routed_NH)
        routed_PH = self.experts(routed_PH, counts)
        routed_TH = routed_PH.index_select(0, place_N).unflatten(0, (-1, self.top_k)).sum(1)
        return self.shared_expert(hidden_TH) + routed_TH, logits_TE


def place_rows(experts_N: Tensor, num_experts: int, *, step: int) -> tuple[Tensor, list[int]]:
    """Place of each row in an order by expert, and rows per expert, rounded up to a multiple of `step`.

    Rows of one expert keep their order; places no row takes are padding and come last within an expert.
    """
    counts_E = torch.bincount(experts_N, minlength=num_experts)
    padded_E = (counts_E + step - 1) // step * step
    order_N = torch.argsort(experts_N, stable=True)
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    rank_N = torch.arange(len(experts_N), device=experts_N.device)
    place_N = torch.empty_like(order_N).scatter_(0, order_N, rank_N + shift_E.index_select(0, experts_N[order_N]))
    return place_N, padded_E.tolist()


def _row_step(rows: Tensor) -> int:
    """What an expert's number of rows is rounded up to.

    On a CPU oneDNN compiles a bf16 kernel for every shape it has not met lately, about 1 ms each, ten times the product
    itself; routing makes new row counts all the time. Multiples of 16 are few enough to stay compiled.
    """
    return 16 if rows.device.type == "cpu" and rows.dtype == torch.bfloat16 else 1


class SparseRouter(Llama4Router):
    """Llama4Router that names the chosen experts instead of scoring every one."""

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores_TK, logits_TE, experts_TK. The logits stay second, where output recorders take them."""
        logits_TE = nn.Linear.forward(self, hidden_TH)
        top_TK, experts_TK = torch.topk(logits_TE, self.top_k, dim=1)
        return torch.sigmoid(top_TK.float()).to(top_TK.dtype), logits_TE, experts_TK


class SparseExperts(Llama4TextExperts):
    """Llama4TextExperts over rows sorted by expert. It reads its own parameters, so ZeRO-3 gathers them for it."""

    def forward(self, routed_PH: Tensor, counts: list[int]) -> Tensor:
        """Send the first counts[0] rows through expert 0, the next counts[1] through expert 1, ..."""
        return GroupedSwiglu.apply(routed_PH, self.gate_up_proj, self.down_proj, counts)


class GroupedSwiglu(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) for rows sorted by expert, with weights stored [E, in, out].

    One autograd node for all experts: indexing a parameter per expert would make autograd allocate and add a full-size
    gradient E times. Here each expert's gradient is multiplied straight into its slice of one tensor.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, rows_NH: Tensor, gate_up_EHG: Tensor, down_EIH: Tensor, counts: list[int]) -> Tensor:
        gate_up_NG = rows_NH.new_empty(len(rows_NH), gate_up_EHG.shape[2])
        _each_expert(rows_NH, gate_up_EHG, gate_up_NG, counts)
        gate_NI, up_NI = gate_up_NG.chunk(2, dim=1)
        output_NH = torch.empty_like(rows_NH)
        _each_expert(F.silu(gate_NI).mul_(up_NI), down_EIH, output_NH, counts)
        # The leaf parameters themselves: ZeRO-3 frees and refills their storage between forward and backward.
        ctx.save_for_backward(rows_NH, gate_up_NG, gate_up_EHG, down_EIH)
        ctx.counts = counts
        return output_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_NH: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows_NH, gate_up_NG, gate_up_EHG, down_EIH = ctx.saved_tensors
        needs_rows, needs_gate_up, needs_down, _ = ctx.needs_input_grad
        gate_NI, up_NI = gate_up_NG.chunk(2, dim=1)
        silu_NI = F.silu(gate_NI)
        d_rows = d_gate_up = d_down = None
        if needs_down:
            d_down = _weight_gradient(silu_NI * up_NI, grad_NH, down_EIH, ctx.counts)
        if needs_rows or needs_gate_up:
            d_inner_NI = torch.empty_like(silu_NI)
            _each_expert(grad_NH, down_EIH.transpose(1, 2), d_inner_NI, ctx.counts)
            d_gate_up_NG = torch.empty_like(gate_up_NG)
            d_gate_NI, d_up_NI = d_gate_up_NG.chunk(2, dim=1)
            torch.mul(d_inner_NI, silu_NI, out=d_up_NI)
            torch.ops.aten.silu_backward.grad_input(d_inner_NI.mul_(up_NI), gate_NI, grad_input=d_gate_NI)
        if needs_rows:
            d_rows = torch.empty_like(rows_NH)
            _each_expert(d_gate_up_NG, gate_up_EHG.transpose(1, 2), d_rows, ctx.counts)
        if needs_gate_up:
            d_gate_up = _weight_gradient(rows_NH, d_gate_up_NG, gate_up_EHG, ctx.counts)
        return d_rows, d_gate_up, d_down, None


def _each_expert(rows: Tensor, weight: Tensor, output: Tensor, counts: list[int]) -> None:
    """Write rows_e @ weight[e] into the same rows of `output`, for every expert that has rows."""
    parts = zip(rows.split(counts), weight.unbind(0), output.split(counts), counts, strict=True)
    for rows_e, weight_e, output_e, count in parts:
        if count:
            torch.mm(rows_e, weight_e, out=output_e)


def _weight_gradient(rows: Tensor, grads: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Return rows_e^T @ grads_e for every expert, stacked and shaped like `weight`; zero for an idle expert."""
    gradient = torch.empty_like(weight)
    parts = zip(rows.split(counts), grads.split(counts), gradient.unbind(0), counts, strict=True)
    for rows_e, grads_e, gradient_e, count in parts:
        if count:
            torch.mm(rows_e.t(), grads_e, out=gradient_e)
        else:
            gradient_e.zero_()
    return gradient
