"""A teacher that is only read: no gradients, no optimiser, one forward a batch for all students.

    teacher = FrozenTeacher(model)
    targets = teacher.targets(input_ids_BT)       # SoftTargets over B*T tokens

Shapes: B rows, T tokens a row.
"""

import torch
from torch import nn

from teachers.targets import SoftTargets, decoder_of, has_plain_head, make_targets


class FrozenTeacher:
    """Any transformers causal LM, in eval mode, whole on every rank."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self._plain_head = has_plain_head(model)

    def targets(self, input_ids_BT: torch.Tensor) -> SoftTargets:
        """Soft targets of the tokens that follow each of these, flattened to B*T."""
        with torch.no_grad():
            if self._plain_head:
                hidden = decoder_of(self.model)(input_ids=input_ids_BT, use_cache=False).last_hidden_state
                return make_targets(hidden.flatten(0, 1), self.model.get_output_embeddings().weight)
            return make_targets(self.model(input_ids=input_ids_BT, use_cache=False).logits.flatten(0, 1), None)
