"""A model's structure without its weights, to be filled while something needs a ZeRO-3 model whole on every rank.

shell = shell_of(model)                        # before deepspeed.initialize
model = filled(shell, partitioned)             # every rank calls; drop it when done
"""

import copy

import deepspeed
import torch
from deepspeed.runtime.zero.utils import is_zero_param
from torch import nn
from transformers import PreTrainedModel


def shell_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with parameters on the meta device and buffers of its own. No DeepSpeed hook is on it, nor will be."""
    weightless = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in model.parameters()}
    return copy.deepcopy(model, weightless)


def filled(shell: PreTrainedModel, partitioned: nn.Module) -> PreTrainedModel:
    """A copy of the shell with the weights of the same model under ZeRO-3, gathered one at a time on every rank.

    One whole copy of the weights, and once more the largest of them. DeepSpeed's own hooks would gather every layer
    again in every forward, and generation makes one a token.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in partitioned.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_zero_param(parameter)):
            weights[name] = parameter.detach().clone()
    model = copy.deepcopy(shell)
    model.load_state_dict(weights, strict=False, assign=True)  # not strict: buffers are the shell's own
    return model
