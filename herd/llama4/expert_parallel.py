"""Expert parallelism: Llama 4 for DeepSpeed's AutoEP, and the way back to Hugging Face names.

    install_preset()                                       # before deepspeed.initialize
    state = full_state_dict(engine)                        # every rank calls; rank 0 gets the weights

The only file that touches AutoEP's internals (written for DeepSpeed 0.19.8; a test pins each of them).
"""

from collections.abc import Callable
from dataclasses import replace

import deepspeed
import torch
import torch.distributed
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets import registry
from deepspeed.module_inject.auto_ep_presets.base import (
    AutoEPPresetAdapter,
    ForwardContract,
    MoELayerSpec,
    MoEModelPreset,
)
from deepspeed.runtime.zero.utils import is_zero_param
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4Router

from herd.llama4.plan import experts_divisible as experts_divisible  # asked for here by those who spread experts
from herd.run.deepspeed_config import AUTOEP_PRESET as PRESET
from herd.run.errors import ConfigError


class _RecordedGate(Llama4Router):
    """AutoEP's gate, a plain Linear, as a class that transformers' recorder of router logits looks for."""

    def forward(self, hidden_TH: Tensor) -> Tensor:
        return nn.Linear.forward(self, hidden_TH)


class _Llama4Adapter(AutoEPPresetAdapter):
    """Makes AutoEP's layer answer as Llama4TextMoe does, (rows [T, H], second value), and keeps its logits recorded.

    The decoder layer drops the second value, so it stays None: AutoEP would multiply by the gate once more to fill it.
    """

    def adjust_forward_contract(self, contract: ForwardContract) -> ForwardContract:
        return replace(contract, return_router_logits=True, capture_target="none", moe_output_shape="flat")

    def retarget_transformers_output_recorders(
        self,
        model: nn.Module,
        spec: MoELayerSpec,
        replacement: nn.Module,
        retargeted_keys: set[str],
        remove_output_capture_hooks: Callable[[nn.Module], int],
    ) -> None:
        """Called once a model, after the last replacement. (AutoEP's own way fails on transformers 5.23's registry.)"""
        remove_output_capture_hooks(model)
        for module in model.modules():
            if isinstance(module, AutoEPMoELayer):
                module.router.gate.__class__ = _RecordedGate
            elif isinstance(module, PreTrainedModel):
                module._output_capturing_hooks_installed = False


def install_preset() -> None:
    """Teach AutoEP the `llama4` preset. Calling it again changes nothing."""
    registry.PRESET_MODELS[PRESET] = MoEModelPreset(
        moe_layer_pattern=r"(?:\w+\.)*layers\.\d+\.feed_forward",
        router_pattern="router",
        experts_pattern="experts",
        expert_storage="fused_3d",
        expert_w1="gate_up_proj",
        expert_w2="down_proj",
        expert_w3=None,  # gate and up are one tensor, stored [E, hidden, 2 x intermediate]
        num_experts_attr="num_local_experts",
        top_k_attr="num_experts_per_tok",
        score_func="sigmoid",
        score_apply="pre",
        route_norm=False,
        gate_bias=False,
        has_shared_experts=True,
        shared_experts_pattern="shared_expert",
        supports_expert_bias=False,
        preset_adapter=PRESET,
        hf_model_types=("llama4_text", "llama4"),
    )
    registry._PRESET_ADAPTERS[PRESET] = _Llama4Adapter()


def full_state_dict(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor] | None:
    """Return the engine's weights under transformers' names on the CPU of rank 0; None on the other ranks.

    Every rank must call it: ZeRO-3 partitions and AutoEP's experts are gathered parameter by parameter, so no rank
    but the first ever holds more than one of them. Dtypes are the module's own (not the optimiser's fp32 copies).
    """
    state: dict[str, Tensor] = {}
    layers = {name: layer for name, layer in engine.module.named_modules() if isinstance(layer, AutoEPMoELayer)}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        prefix, inside, leaf = name.rpartition(".experts.")
        if not inside or prefix not in layers:
            kept = _gather(parameter)
            if kept is not None:
                state[_transformers_name(name, layers)] = kept
        elif leaf == "w1":  # once a layer; w2 and w3 come along
            state.update(_fused_experts(prefix, layers[prefix]))
    return state if torch.distributed.get_rank() == 0 else None


def _transformers_name(name: str, layers: dict[str, AutoEPMoELayer]) -> str:
    """Undo AutoEP's renaming of router and shared expert."""
    for here, there in ((".router.gate.", ".router."), (".shared_experts.", ".shared_expert.")):
        prefix, inside, leaf = name.partition(here)
        if inside and prefix in layers:
            return prefix + there + leaf
    return name


def _gather(parameter: nn.Parameter) -> Tensor | None:
    """Return the whole parameter on rank 0's CPU, None elsewhere."""
    with deepspeed.zero.GatheredParameters([parameter], enabled=is_zero_param(parameter)):
        if torch.distributed.get_rank() != 0:
            return None
        return parameter.detach().to("cpu", copy=True)


def _fused_experts(prefix: str, layer: AutoEPMoELayer) -> dict[str, Tensor]:
    """Return the layer's gate_up_proj [E, H, 2I] and down_proj [E, I, H] on rank 0, nothing elsewhere."""
    if layer.model_family != PRESET:
        raise ConfigError(
            f"{prefix}: experts spread by AutoEP's preset {layer.model_family!r} cannot be exported; "
            f"use parallel.expert_parallel = 1 for this model"
        )
    gate, down, up = (_gather_experts(w, layer) for w in (layer.experts.w1, layer.experts.w2, layer.experts.w3))
    if gate is None or down is None or up is None:
        return {}
    return {
        f"{prefix}.experts.gate_up_proj": torch.cat([gate, up], dim=1).transpose(1, 2).contiguous(),
        f"{prefix}.experts.down_proj": down.transpose(1, 2).contiguous(),
    }


def _gather_experts(parameter: nn.Parameter, layer: AutoEPMoELayer) -> Tensor | None:
    """Return [E, out, in] of all experts on rank 0's CPU, None elsewhere."""
    with deepspeed.zero.GatheredParameters([parameter], enabled=is_zero_param(parameter)):
        local = parameter.detach().clone()
    if 0 not in torch.distributed.get_process_group_ranks(layer.ep_group):
        return None
    main = torch.distributed.get_rank() == 0
    parts = [torch.empty_like(local) for _ in range(layer.ep_size)] if main else None
    torch.distributed.gather(local, parts, dst=0, group=layer.ep_group)
    return torch.cat(parts).cpu() if parts else None
