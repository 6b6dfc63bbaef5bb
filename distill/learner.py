"""A causal language model as the engine runs it: tokens in; loss, statistics and detached outputs out.

    learner = Learner(model)                  # any transformers causal LM
    loss, stats_ST, count, outputs = learner(input_ids_BT, loss_of=fused)

The loss is computed inside the head's forward, so ZeRO-3 gathers the head exactly as it gathers any layer.
Shapes: B rows, T tokens, H width, V vocabulary, N feature losses; flattened tokens are B*T.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import nn

from distill.features import FeatureLosses, Lesson
from distill.losses import Distillation
from herd.llama4.transfer import Rule
from teachers.recorder import Recorder
from teachers.targets import SoftTargets, decoder_of, has_plain_head, make_targets

PLAIN = Rule()
FusedLoss = Callable[[torch.Tensor, torch.Tensor], Distillation]


class LossHead(nn.Linear):
    """A language-model head that can end in a loss instead of logits."""

    def forward(
        self, hidden: torch.Tensor, loss_of: FusedLoss | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if loss_of is None:
            return super().forward(hidden)
        out = loss_of(hidden, self.weight)
        return out.loss, out.stats_ST, out.num_tokens


class Learner(nn.Module):
    """Wraps a causal LM; `plain_head` says whether its logits are just hidden states times the head."""

    def __init__(self, model: nn.Module, features: FeatureLosses | None = None) -> None:
        super().__init__()
        self.model = model
        self.features = features
        self.recorder: Recorder | None = None
        self.config = model.config  # DeepSpeed's AutoEP reads the expert counts here
        self.plain_head = has_plain_head(model)
        if self.plain_head:
            model.get_output_embeddings().__class__ = LossHead

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    def forward(
        self, input_ids_BT: torch.Tensor, loss_of: FusedLoss | None = None, lesson: Lesson | None = None
    ) -> tuple[torch.Tensor, ...]:
        """(loss, stats_ST, num_tokens, outputs): outputs are hidden_TH, or logits_TV when the head is not plain.

        `loss_of(hidden_TH, head_VH)`, or `loss_of(logits_TV, None)` when the head is not plain; without it only
        outputs are returned. With a `lesson` the loss includes the feature losses, and their sums_N come last.
        """
        with nullcontext() if lesson is None else self.recorder.recording() as shown:
            outputs = self._run(input_ids_BT)
        if loss_of is None:
            return (outputs,)
        if self.plain_head:
            loss, stats_ST, count = self.head(outputs, loss_of)
        else:
            out = loss_of(outputs, None)
            loss, stats_ST, count = out.loss, out.stats_ST, out.num_tokens
        if lesson is None:
            return loss, stats_ST, count, outputs.detach()
        feature_loss, sums_N = self.features.compare(shown, lesson)
        return loss + feature_loss, stats_ST, count, outputs.detach(), sums_N

    def _run(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        if self.plain_head:
            return decoder_of(self.model)(input_ids=input_ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)
        return self.model(input_ids=input_ids_BT, use_cache=False).logits.flatten(0, 1)

    def targets(self, outputs: torch.Tensor) -> SoftTargets:
        """What these outputs are to a student. The head must be whole (gathered) while the targets are read."""
        return make_targets(outputs, self.head.weight if self.plain_head else None)


def parameter_groups(
    learner: nn.Module, *, weight_decay: float, eps: float, rules: Mapping[str, Rule] | None = None
) -> list[dict]:
    """AdamW's groups: matrices decay; embeddings, norms and biases do not. With `rules`, one for each set of factors.

    rules: by the parameter's name in the model; `lr_factor` of a group says how much of the run's rate it takes.
    """
    embeddings = {id(module.weight) for module in learner.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[Rule, bool], dict] = {}
    for name, parameter in learner.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.dim() >= 2 and id(parameter) not in embeddings
        # What a learner has besides its model, projections of feature losses, is as small as it was.
        rule = (rules or {}).get(name.removeprefix("model."), PLAIN)
        group = groups.setdefault(
            (rule, is_matrix),
            {
                "params": [],
                "weight_decay": weight_decay * rule.weight_decay if is_matrix else 0.0,
                "eps": eps * rule.eps,
                "lr_factor": rule.lr,
                "name": f"{'decayed' if is_matrix else 'free'}-{len(groups)}",
            },
        )
        group["params"].append(parameter)
    # Matrices first, as checkpoints of runs without rules have them.
    return [group for _, group in sorted(groups.items(), key=lambda item: not item[0][1])]
