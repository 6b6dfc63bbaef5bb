"""Safetensors files written tensor by tensor: the layout is known beforehand, so no more than one tensor is held.

digests = write_shards(folder, plan.headers(), tensors, shard_bytes=5 * 10**9)
"""

import hashlib
import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from quant.formats.format import Header
from quant.tensor_files import DTYPES, INDEX, SINGLE

SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_shards(
    folder: Path, headers: Mapping[str, Header], tensors: Mapping[str, Tensor], *, shard_bytes: int = SHARD_BYTES
) -> dict[str, str]:
    """Write every tensor in the order of the headers; returns the sha256 of each as it was in memory.

    One file, or several with an index once the tensors exceed shard_bytes (a single larger tensor gets its own file).
    Same headers and tensors: same bytes.
    """
    shards = _cut(headers, shard_bytes)
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests |= _write_file(folder / file, {name: headers[name] for name in names}, tensors)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(_size(header) for header in headers.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return digests


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor, row-major."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _cut(headers: Mapping[str, Header], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, header in headers.items():
        size = _size(header)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_file(path: Path, headers: Mapping[str, Header], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    digests = {}
    with path.open("wb") as file:
        offsets = _write_header(file, headers)
        # In the order of the model, not of the file: a layer's tensors, which are made together, follow one another.
        for name, header in headers.items():
            tensor = tensors[name]
            assert (tensor.dtype, tuple(tensor.shape)) == header, name
            raw = tensor_bytes(tensor)
            file.seek(offsets[name])
            file.write(raw)
            digests[name] = hashlib.sha256(raw).hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return digests


def _write_header(file: BinaryIO, headers: Mapping[str, Header]) -> dict[str, int]:
    """Write the table; returns where each tensor begins in the file."""
    table: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    offset = 0
    for name in _aligned(headers):
        dtype, shape = headers[name]
        starts[name], offset = offset, offset + _size(headers[name])
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], offset]}
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    return {name: 8 + len(raw) + start for name, start in starts.items()}


def _aligned(headers: Mapping[str, Header]) -> list[str]:
    """Names in the order of the file: widest first, as the safetensors library does, so that each is aligned."""
    return sorted(headers, key=lambda name: -_width(headers[name][0]))


def _width(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def _size(header: Header) -> int:
    return prod(header[1]) * _width(header[0])
