"""The single checks of the export gate; `quant.gate` runs them in order.

check = check_tensors(config, allocation, ignored, headers, facts)
check.passed, check.detail
"""

import hashlib
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from quant.allocations import Allocation, group_layers
from quant.architectures import (
    VLLM_NAMES,
    architecture,
    build_skeleton,
    has_experts,
    kept_because,
    split_groups,
    tied_names,
)
from quant.formats.format import Header
from quant.loading import load_with_info
from quant.plans import QUANTISED
from quant.probes import Probe, digest_weights, probe_tokens, run
from quant.readers import readers
from quant.reports import Check, few
from quant.sections import read_section
from quant.shards import tensor_bytes
from quant.sources import read_config
from quant.streaming import stream_folder
from quant.tensor_files import TensorFiles

SAMPLE_TOKENS = 16
LAYERWISE = "layer by layer"


def check_configuration(config: PretrainedConfig) -> tuple[Check, Allocation | None, list[str]]:
    """The quantization_config is exactly what known schemes write. Also returns which, and the ignore list."""
    allocation, ignored, fault = read_section(config.to_dict().get("quantization_config") or {})
    if allocation is None:
        return Check("configuration", False, fault), None, []
    return Check("configuration", True, f"{allocation.label}, {len(ignored)} layers ignored"), allocation, ignored


def check_tensors(
    config: PretrainedConfig,
    allocation: Allocation,
    ignored: list[str],
    headers: dict[str, Header],
    facts: dict[str, Any],
) -> Check:
    """The tensors are exactly those that the architecture, the schemes and the ignore list call for."""
    skeleton = build_skeleton(config)
    linears = {name: tuple(m.weight.shape) for name, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
    faults = [f"ignore lists {name}, which is no linear layer of the model" for name in ignored if name not in linears]
    quantised = {name: shape for name, shape in linears.items() if name not in set(ignored)}
    schemes = {name: allocation.of(name) for name in quantised}
    faults += [f"{name} belongs to no group of config.json" for name, scheme in schemes.items() if scheme is None]
    if faults:
        return Check("tensors", False, few(faults))
    expected: dict[str, Header] = {}
    for name, tensor in skeleton.state_dict().items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in quantised:
            expected |= {f"{module}.{suffix}": h for suffix, h in schemes[module].stored(quantised[module]).items()}
        elif name not in tied_names(skeleton):
            expected[name] = (torch.bfloat16 if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
    faults += _compare_headers(expected, headers, set(quantised), set(ignored))
    weights = sum(map(prod, quantised.values()))
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    facts |= {"quantised_layers": len(quantised), "quantised_weights": weights, "quantised_share": weights / total}
    moe = has_experts(skeleton)
    reading = [readers(scheme.name, scheme.container, moe=moe) for scheme in allocation.schemes]
    facts["readers"] = [name for name in reading[0] if all(name in others for others in reading)]
    if faults:
        return Check("tensors", False, few(faults))
    share = f"{len(quantised)} layers, {weights / total:.1%} of all weights, quantised"
    return Check("tensors", True, f"{len(headers)} as expected; {share}")


def _compare_headers(
    expected: dict[str, Header], headers: dict[str, Header], quantised: set[str], ignored: set[str]
) -> list[str]:
    """One line a tensor; one a layer that is stored otherwise than config.json says, which explains all its tensors."""
    strange = {owner(name): name for name in sorted(headers.keys() - expected.keys(), reverse=True)}
    faults = []
    for name in sorted(headers.keys() | expected.keys()):
        module = owner(name)
        wanted, found = expected.get(name), headers.get(name)
        if wanted == found or (module in strange and module in quantised | ignored and strange[module] != name):
            continue
        if found is None:
            faults.append(f"{name} is missing")
        elif wanted is None and module in quantised:
            faults.append(f"{module} is stored as {name} but config.json says it is quantised")
        elif wanted is None and module in ignored:
            faults.append(f"{name} is stored though config.json ignores {module}")
        elif wanted is None:
            faults.append(f"{name} is unexpected")
        else:
            faults.append(f"{name} is {_describe(found)}, expected {_describe(wanted)}")
    return faults


def check_merged(
    config: PretrainedConfig, allocation: Allocation, ignored: list[str], headers: dict[str, Header]
) -> Check:
    """Layers a server merges are of one scheme, and those that must stay unquantised do."""
    stored = {owner(name) for name in headers if name.endswith(QUANTISED)}
    faults = split_groups(stored, set(ignored))
    for group, names in group_layers(sorted(stored)).items():
        labels = sorted({scheme.label for name in names if (scheme := allocation.of(name)) is not None})
        if len(labels) > 1:
            faults.append(f"{group}: {labels[0]} and {labels[1]}, which servers cannot merge")
    faults += [
        f"{name} is quantised, but {reason}" for name in sorted(stored) if (reason := kept_because(name, config))
    ]
    return Check("servable", not faults, few(faults) if faults else "merged layers are of one scheme")


def owner(name: str) -> str:
    """The module a stored tensor belongs to: `a.q_proj` for `a.q_proj.weight.absmax`."""
    return re.sub(r"(\.weight)?\.[^.]+$", "", re.sub(r"\.quant_state\..*$", ".quant_state", name))


def check_names(config: PretrainedConfig, headers: dict[str, Header]) -> Check:
    """Every tensor name is one that vLLM's loader of this architecture maps."""
    patterns = VLLM_NAMES.get(architecture(config))
    if patterns is None:
        return Check("names", True, f"no rule for vLLM's {architecture(config)}; transformers' names hold")
    allowed = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    strange = [name for name in headers if not allowed.fullmatch(name)]
    return Check("names", not strange, few(strange) if strange else "every name maps to vLLM's loader")


def check_digests(name: str, wanted: dict[str, str], found: dict[str, str]) -> Check:
    """Every wanted tensor is found with the same sha256."""
    differing = [key for key in wanted if wanted[key] != found.get(key)]
    detail = f"{few(differing)} differs from the in-memory model" if differing else f"{len(wanted)} tensors identical"
    return Check(name, not differing, detail)


def run_checks(folder: Path, probe: Probe | None, *, whole: bool) -> Iterator[Check]:
    """Load the folder with transformers, compare weights and logits bit for bit with the probe's, generate a sample.

    whole: the model at once, else unit by unit, where a sample is one token a row.
    """
    if whole:
        model, info = load_with_info(folder)
        input_BT = probe_tokens(model.config) if probe is None else probe.input_BT
        logits_BTV, digests = run(model, input_BT), digest_weights(model)
    else:
        running, info = stream_folder(folder)
        input_BT = probe_tokens(read_config(folder)) if probe is None else probe.input_BT
        logits_BTV = running.logits(input_BT)
        running.finish()
        digests = running.digests
    faults = [f"{kind}: {few(sorted(map(str, found)))}" for kind, found in sorted(info.items()) if found]
    how = "" if whole else f", {LAYERWISE}"
    yield Check(
        "reload", not faults, "; ".join(faults) if faults else f"nothing missing, unexpected or mismatched{how}"
    )
    if probe is not None:
        yield check_digests("weights", probe.weights, digests)
    if not torch.isfinite(logits_BTV).all():
        yield Check("logits", False, "NaN or Inf")
        return
    if probe is not None:
        yield _compare_logits(logits_BTV, probe.logits_BTV)
    yield _check_sample(model, input_BT) if whole else _check_next(logits_BTV)


def _compare_logits(found_BTV: Tensor, wanted_BTV: Tensor) -> Check:
    apart = (found_BTV.float() - wanted_BTV.float()).abs().max().item()
    same = torch.equal(found_BTV, wanted_BTV)
    return Check("logits", same, "bit-equal to the in-memory model" if same else f"differ by up to {apart:.3g}")


def _check_next(logits_BTV: Tensor) -> Check:
    """A sample that costs no further pass over the files."""
    return Check("generation", True, f"greedy next tokens {logits_BTV[:, -1].argmax(-1).tolist()}")


def _check_sample(model: PreTrainedModel, input_BT: Tensor) -> Check:
    with torch.inference_mode():
        prompt = input_BT[:1, :8]
        tokens = model.generate(prompt, max_new_tokens=SAMPLE_TOKENS, do_sample=False, pad_token_id=0)
    sample = tokens[0, prompt.shape[1] :].tolist()
    vocabulary = model.config.get_text_config().vocab_size
    sound = 0 < len(sample) <= SAMPLE_TOKENS and all(0 <= token < vocabulary for token in sample)
    return Check("generation", sound, f"greedy tokens {sample}")


def stored_headers(folder: Path) -> dict[str, Header]:
    """dtype and shape of every tensor in a folder."""
    return {name: (place.dtype, place.shape) for name, place in TensorFiles(folder).places.items()}


def digest_stored(folder: Path) -> dict[str, str]:
    """sha256 of every tensor in a folder, as stored."""
    return {name: hashlib.sha256(tensor_bytes(t)).hexdigest() for name, t in TensorFiles(folder).items()}


def _describe(header: Header) -> str:
    return f"{str(header[0]).removeprefix('torch.')} {list(header[1])}"
