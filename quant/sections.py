"""The `quantization_config` of config.json: written for a scheme, and read back.

content = section(allocation, ignored)               # ignored: every linear layer left alone, by exact name
allocation, ignored, fault = read_section(content)   # the one that writes exactly this, or what differs
"""

import json
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)
from transformers import BitsAndBytesConfig, FineGrainedFP8Config

from quant.allocations import LINEAR, Allocation
from quant.readers import BITSANDBYTES, COMPRESSED, FINE_GRAINED, GGUF, GROUP_SIZES, SCHEMES
from quant.schemes import Scheme

_PRESETS = {
    "int8": ("W8A8", "int-quantized"),
    "fp8": ("FP8_DYNAMIC", "float-quantized"),
    "fp8-static": ("FP8", "float-quantized"),
    "fp8-block": ("FP8_BLOCK", "float-quantized"),
    "mxfp4": ("MXFP4A16", "mxfp4-pack-quantized"),
    "nvfp4": ("NVFP4A16", "nvfp4-pack-quantized"),
}


MIXED_FORMATS = "mixed-precision"


def section(allocation: Allocation, ignored: list[str]) -> dict[str, Any]:
    """What config.json says about a model quantised so.

    For GGUF it is this package's own: the file says everything itself, and transformers refuses the folder by name
    instead of finding no weights.
    """
    scheme = allocation.schemes[0]
    if scheme.container == GGUF:
        return {"quant_method": GGUF, "type": scheme.format.kind, "ignore": ignored}
    if scheme.container == BITSANDBYTES:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=scheme.name == "nf4-double",
            llm_int8_skip_modules=ignored,
        )
        return _plain(config.to_dict())
    if scheme.container == FINE_GRAINED:
        return _plain(FineGrainedFP8Config(modules_to_not_convert=ignored).to_dict())
    return _compressed_tensors(allocation, ignored)


def format_name(scheme: Scheme) -> str:
    """What the container calls the format."""
    if scheme.container == GGUF:
        return scheme.format.kind
    if scheme.container != COMPRESSED:
        return scheme.container
    return _PRESETS[scheme.name][1] if scheme.name in _PRESETS else "pack-quantized"


def _compressed_tensors(allocation: Allocation, ignored: list[str]) -> dict[str, Any]:
    """One group of layers for each scheme. Targets of different groups never meet in a layer."""
    groups = {
        f"group_{number}": _group(scheme, [target for target, each in allocation.parts if each == scheme])
        for number, scheme in enumerate(allocation.schemes)
    }
    formats = {format_name(scheme) for scheme in allocation.schemes}
    config = QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else MIXED_FORMATS,
        quantization_status="compressed",
        ignore=ignored,
    )
    return config.model_dump(mode="json", exclude={"moe_sparsity_config"})


def _group(scheme: Scheme, targets: list[str]) -> QuantizationScheme:
    name = format_name(scheme)
    if scheme.name in _PRESETS:
        group = preset_name_to_scheme(_PRESETS[scheme.name][0], targets)
        group.format = name
        return group
    grid = scheme.grid
    strategy = {"strategy": "channel"} if grid.group_size is None else {"strategy": "group"}
    size = {} if grid.group_size is None else {"group_size": grid.group_size}
    weights = QuantizationArgs(num_bits=grid.bits, type="int", symmetric=grid.symmetric, **strategy, **size)
    return QuantizationScheme(targets=targets, weights=weights, format=name)


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """As JSON holds it: no enumerations or tuples, and without what the class keeps for itself."""
    return json.loads(json.dumps({key: value for key, value in content.items() if not key.startswith("_")}))


def read_section(content: dict[str, Any]) -> tuple[Allocation | None, list[str], str]:
    """The allocation and ignore list a `quantization_config` was written for; else None and what is wrong."""
    methods = {"compressed-tensors": COMPRESSED, "bitsandbytes": BITSANDBYTES, "fp8": FINE_GRAINED, "gguf": GGUF}
    container = methods.get(str(content.get("quant_method")))
    if container is None:
        return None, [], "quantization_config describes no scheme of this package"
    key = {BITSANDBYTES: "llm_int8_skip_modules", FINE_GRAINED: "modules_to_not_convert"}.get(container, "ignore")
    ignored, groups = content.get(key) or [], content.get("config_groups") or {}
    if not _are_names(ignored):
        return None, [], f"quantization_config.{key} = {ignored!r} is no list of layers"
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        return None, [], f"quantization_config.config_groups = {groups!r} maps no groups to what they are"
    candidates = [Allocation.uniform(scheme) for scheme in _schemes(container)]
    if container == COMPRESSED and len(groups) > 1:
        allocation = _read_groups(groups)
        candidates = [] if allocation is None else [allocation]
    differing = {allocation: _differing(section(allocation, ignored), content) for allocation in candidates}
    if not differing:
        return None, [], "quantization_config has a group of layers that no scheme of this package writes"
    nearest = min(differing, key=lambda allocation: len(differing[allocation]))
    if not differing[nearest]:
        return nearest, ignored, ""
    if len(differing[nearest]) > 1:
        return None, [], "quantization_config describes no scheme of this package"
    return None, [], f"quantization_config.{differing[nearest][0]} is not what {nearest.label} writes"


def _read_groups(groups: dict[str, Any]) -> Allocation | None:
    """Every group's targets with the scheme that writes such a group; None when one of them is no scheme's."""
    parts: list[tuple[str, Scheme]] = []
    for group in groups.values():
        targets = group.get("targets") or [LINEAR]
        if not _are_names(targets):
            return None
        found = [scheme for scheme in _schemes(COMPRESSED) if _group(scheme, targets).model_dump(mode="json") == group]
        if not found:
            return None
        parts += [(target, found[0]) for target in targets]
    return Allocation(tuple(parts))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _differing(wanted: dict[str, Any], content: dict[str, Any]) -> list[str]:
    return sorted(key for key in wanted if wanted[key] != content.get(key))


def _schemes(container: str) -> list[Scheme]:
    names = [name for name, kind in SCHEMES.items() if container in kind.containers]
    return [
        Scheme.named(name, size, container)
        for name in names
        for size in ((32,) if container == GGUF else GROUP_SIZES if SCHEMES[name].grouped else (64,))
    ]
