"""A teacher that is only read: no gradients, no optimiser, one forward a batch for all students.

    teacher = FrozenTeacher(model)
    targets = teacher.targets(input_ids_BT)       # SoftTargets over B*T tokens

Shapes: B rows, T tokens a row, G teacher width, V vocabulary.
"""

import torch
from torch import nn

from teachers.targets import SoftTargets, decoder_of, has_plain_head, log_probabilities, make_targets


class FrozenTeacher:
    """Any transformers causal LM, in eval mode, whole on every rank."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self._plain_head = has_plain_head(model)

    def targets(self, input_ids_BT: torch.Tensor) -> SoftTargets:
        """Soft targets of the tokens that follow each of these, flattened to B*T."""
        return make_targets(*self.outputs(input_ids_BT))

    def outputs(self, input_ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [B*T, G] and the head, or logits [B*T, V] and None when there is no plain head."""
        with torch.no_grad():
            if self._plain_head:
                hidden = decoder_of(self.model)(input_ids=input_ids_BT, use_cache=False).last_hidden_state
                return hidden.flatten(0, 1), self.model.get_output_embeddings().weight
            return self.model(input_ids=input_ids_BT, use_cache=False).logits.flatten(0, 1), None

    def score(self, input_ids_BT: torch.Tensor, labels_T: torch.Tensor) -> tuple[float, int]:
        """-log p of the labels, summed, in nats, and how many there are; -100 is not scored."""
        scored_T = labels_T != -100
        log_p_T = log_probabilities(self.targets(input_ids_BT), labels_T.masked_fill(~scored_T, 0))
        return -log_p_T[scored_T].double().sum().item(), int(scored_T.sum())
