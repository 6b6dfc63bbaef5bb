"""Safetensors files written tensor by tensor: the layout is known beforehand, so no more than one tensor is held.

digests = write_shards(folder, plan.headers(), tensors, shard_bytes=5 * 10**9)
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from quant.formats.format import Header
from quant.sources import INDEX, SINGLE, open_safetensors, shard_paths

SHARD_BYTES = 5 * 10**9
_NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a written folder, each read when it is asked for."""

    def __init__(self, folder: Path):
        self._places: dict[str, Path] = {}
        for path in shard_paths(folder):
            with open_safetensors(path) as file:
                self._places |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        with open_safetensors(self._places[name]) as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


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
    # Largest alignment first, as the safetensors library does, so that every tensor is aligned to its own width.
    with path.open("wb") as file:
        _write_header(file, headers)
        digests = {}
        for name in _aligned(headers):
            tensor = tensors[name]
            assert (tensor.dtype, tuple(tensor.shape)) == headers[name], name
            raw = tensor_bytes(tensor)
            file.write(raw)
            digests[name] = hashlib.sha256(raw).hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return digests


def _write_header(file: BinaryIO, headers: Mapping[str, Header]) -> None:
    table: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in _aligned(headers):
        dtype, shape = headers[name]
        end = offset + _size(headers[name])
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)


def _aligned(headers: Mapping[str, Header]) -> list[str]:
    return sorted(headers, key=lambda name: -_width(headers[name][0]))


def _width(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def _size(header: Header) -> int:
    return prod(header[1]) * _width(header[0])
