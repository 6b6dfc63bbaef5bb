"""The gate's checks of a GGUF file's layout; the model it holds is then checked like any other.

for check in layout_checks(folder, config, scheme, stored, facts): check.passed, check.detail
"""

import hashlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import nn
from transformers import PretrainedConfig

from quant.architectures import build_skeleton
from quant.gguf.reading import MODEL, described, entries_of, open_gguf, read_headers, read_values, release
from quant.gguf.writing import describe_model
from quant.readers import GGUF, readers
from quant.reports import Check
from quant.schemes import Scheme


def layout_checks(
    folder: Path, config: PretrainedConfig, scheme: Scheme, stored: dict[str, str] | None, facts: dict[str, Any]
) -> Iterator[Check]:
    """Keys, tensors and bytes; `stored` holds the sha256 of what the quantising process wrote."""
    reader = open_gguf(folder / MODEL)
    yield _check_values(folder, config, read_values(reader))
    yield _check_tensors(config, scheme, read_headers(reader), facts)
    if stored is not None:
        found = _digest_tensors(reader)
        differing = sorted(name for name in stored.keys() | found.keys() if stored.get(name) != found.get(name))
        detail = f"{differing[0]} differs from the in-memory model" if differing else f"{len(found)} tensors identical"
        yield Check("stored bytes", not differing, detail)


def _digest_tensors(reader: gguf.GGUFReader) -> dict[str, str]:
    digests: dict[str, str] = {}
    for tensor in reader.tensors:
        digests[tensor.name] = hashlib.sha256(np.ascontiguousarray(tensor.data)).hexdigest()
        release(reader)
    return digests


def _check_values(folder: Path, config: PretrainedConfig, values: dict[str, Any]) -> Check:
    """Every key is what the configuration and the tokenizer beside the file call for."""
    wanted = describe_model(folder, config, values.get("general.name", ""))
    differing = sorted(key for key in wanted.keys() | values.keys() if not _same(wanted.get(key), values.get(key)))
    if differing:
        key = differing[0]
        return Check("metadata", False, f"{key} is {values.get(key)!r:.80}, expected {wanted.get(key)!r:.80}")
    return Check("metadata", True, f"{len(values)} keys as llama.cpp expects them")


def _same(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, float):  # the file has 32 bits of them
        return np.float32(wanted) == np.float32(found)
    return wanted == found


def _check_tensors(
    config: PretrainedConfig, scheme: Scheme, headers: dict[str, tuple[str, tuple[int, ...]]], facts: dict[str, Any]
) -> Check:
    """The tensors are exactly those of the layout: none missing, left over, or left unquantised."""
    wanted = {entry.name: (entry.kind, entry.shape) for entry in entries_of(config)}
    skeleton = build_skeleton(config)
    _, ignored = described(config)
    shapes = {name: m.weight.shape for name, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
    weights = sum(prod(shape) for name, shape in shapes.items() if name not in ignored)
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    facts |= {
        "quantised_layers": len(shapes.keys() - ignored),
        "quantised_weights": weights,
        "quantised_share": weights / total,
        "readers": readers(scheme.name, GGUF, moe=False),
    }
    faults = [f"ignore lists {name}, which is no linear layer of the model" for name in sorted(ignored - shapes.keys())]
    for name in sorted(wanted.keys() | headers.keys()):
        expected, found = wanted.get(name), headers.get(name)
        if found is None:
            faults.append(f"{name} is missing")
        elif expected is None:
            faults.append(f"{name} is unexpected")
        elif expected != found:
            faults.append(f"{name} is {found[0]} {list(found[1])}, expected {expected[0]} {list(expected[1])}")
    share = f"{len(shapes.keys() - ignored)} layers, {weights / total:.1%} of all weights, quantised"
    return Check("tensors", not faults, "; ".join(faults[:3]) if faults else f"{len(headers)} as expected; {share}")
