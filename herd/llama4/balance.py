"""Keeps experts in use: a tap on router logits, the load-balancing loss, and how the load is spread.

tap, load = RouterTap(model), ExpertLoad(top_k=1)      # after deepspeed.initialize, which may replace the routers
loss = model(tokens, labels=tokens).loss
logits = tap.take()
loss = loss + 0.01 * balance_loss(logits, 1)
load.add(logits)                                       # every micro step; load.take() when metrics are logged
"""

# Suffixes: T tokens, K experts a token, E experts. Lists hold one entry per MoE layer, first layer first.

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder


class RouterTap:
    """Collects the router logits of every MoE layer while `model` runs, without asking it to return them.

    Routers are found where transformers itself would record `router_logits`, so any of its MoE models will do, with
    sparse experts or spread by AutoEP. A model without experts has no layers and gives empty lists.
    """

    def __init__(self, model: nn.Module) -> None:
        self._logits: dict[int, Tensor] = {}
        self._handles = [
            router.register_forward_hook(self._keep(layer, index))
            for layer, (router, index) in enumerate(routers(model))
        ]

    @property
    def layers(self) -> int:
        """Number of MoE layers tapped."""
        return len(self._handles)

    def take(self) -> list[Tensor]:
        """Return logits_TE of the last forward, attached to its graph, and forget them.

        Call it between forward and backward; activation checkpointing runs the layers once more during backward.
        """
        taken, self._logits = self._logits, {}
        return [taken[layer] for layer in sorted(taken)]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, layer: int, index: int) -> Callable[[nn.Module, tuple, Tensor | tuple], None]:
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            logits = output[index] if isinstance(output, tuple) else output
            self._logits[layer] = logits.flatten(0, -2)

        return hook


def balance_loss(logits: Sequence[Tensor], top_k: int, *, group: ProcessGroup | None = None) -> Tensor:
    """Return the Switch load-balancing loss, E x sum_e f_e P_e, averaged over layers: 1 when the load is even.

    `logits` holds logits_TE per MoE layer. f_e, the share of choices that fall on expert e, is taken over all ranks of
    `group` (by default all that are running), P_e, the mean softmax probability, over this rank; the mean of the
    ranks' losses then equals that of one rank with all tokens, and so does the gradient. Zero without layers.
    Source: Fedus et al. 2021, arXiv 2101.03961, equations 4-6; over top-k choices as in transformers.
    """
    if not logits:
        return torch.zeros(())
    counts = [choice_counts(logits_TE, top_k) for logits_TE in logits]
    _sum_over_ranks(counts, group)
    losses = []
    for logits_TE, counts_E in zip(logits, counts, strict=True):
        share_E = counts_E / counts_E.sum()
        probability_E = torch.softmax(logits_TE.float(), dim=-1).mean(0)
        losses.append(logits_TE.shape[-1] * torch.dot(share_E, probability_E))
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class LoadSummary:
    """How evenly tokens fell on experts since the last summary."""

    entropy: float
    """Mean over layers of the load's entropy / log E: 1 when even, 0 when one expert takes all."""
    max_share: float
    """Largest share any expert took of its layer's tokens."""
    dead: int
    """Experts, over all layers, that no token reached."""
    load: list[list[float]]
    """Share of each expert, per MoE layer."""


class ExpertLoad:
    """Adds up, on the device, how many tokens each expert received."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self._counts: list[Tensor] = []

    def add(self, logits: Sequence[Tensor]) -> None:
        """Count the choices of one forward; `logits` holds logits_TE per MoE layer. Nothing waits for the device."""
        counts = [choice_counts(logits_TE, self.top_k) for logits_TE in logits]
        if not self._counts:
            self._counts = counts
        else:
            torch._foreach_add_(self._counts, counts)

    def take(self, *, group: ProcessGroup | None = None) -> LoadSummary | None:
        """Summarise the load over all ranks of `group` and start anew; every rank must call it. None if nothing fell.

        Counts are fp32 and stay exact up to 2^24 tokens per expert between two calls.
        """
        counts, self._counts = self._counts, []
        if not counts:
            return None
        _sum_over_ranks(counts, group)
        shares = [counts_E.cpu() / counts_E.cpu().sum() for counts_E in counts]
        evenness = [torch.special.entr(share_E).sum() / torch.tensor(float(len(share_E))).log() for share_E in shares]
        return LoadSummary(
            entropy=torch.stack(evenness).mean().item(),
            max_share=max(share_E.max().item() for share_E in shares),
            dead=sum(int((share_E == 0).sum()) for share_E in shares),
            load=[share_E.tolist() for share_E in shares],
        )


def choice_counts(logits_TE: Tensor, top_k: int) -> Tensor:
    """Return counts_E (fp32): how many of the T x top_k choices fall on each expert."""
    chosen_TK = logits_TE.detach().topk(top_k, dim=-1).indices
    counts_E = torch.zeros(logits_TE.shape[-1], device=logits_TE.device)
    return counts_E.scatter_add_(0, chosen_TK.flatten(), torch.ones_like(chosen_TK.flatten(), dtype=torch.float32))


def _sum_over_ranks(counts: list[Tensor], group: ProcessGroup | None) -> None:
    """Add up `counts` over the ranks in place, in one collective."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size(group) > 1:
        flat = torch.cat(counts)
        torch.distributed.all_reduce(flat, group=group)
        torch._foreach_copy_(counts, list(flat.split([len(counts_E) for counts_E in counts])))


def routers(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Yield every module transformers would record router logits from, and where in its output they are."""
    seen: set[int] = set()
    for owner in model.modules():
        if not isinstance(owner, PreTrainedModel):
            continue
        recorders = (owner._can_record_outputs or {}).get("router_logits", [])
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            if not isinstance(recorder, OutputRecorder):  # a bare class: transformers then takes the second output
                recorder = OutputRecorder(recorder, index=1)
            for name, module in owner.named_modules():
                inside = recorder.layer_name is None or f".{recorder.layer_name}." in f".{name}."
                if inside and isinstance(module, recorder.target_class) and id(module) not in seen:
                    seen.add(id(module))
                    yield module, recorder.index
