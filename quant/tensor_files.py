"""The tensors of a folder of safetensors, read one at a time with plain reads: nothing stays mapped.

files = TensorFiles("exports/scout-int4")
files["lm_head.weight"]                                    # the tensor, read now
files.places["lm_head.weight"].read(first=0, shape=(2, 64))      # its first 128 elements, nothing else
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from herd.run.errors import DataError, first_line
from herd.run.weight_files import read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Those that are read and written here, by the format's own names."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie, row-major and little-endian."""

    path: Path
    name: str
    offset: int
    dtype: torch.dtype | None
    """None for one that is not read here."""
    shape: tuple[int, ...]

    def read(self, *, first: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor of that shape (else the whole one), of the elements from `first` on.

        DataError for a file that ends too early or a strange dtype.
        """
        if self.dtype is None:
            raise DataError(f"{self.path}: {self.name} is of a dtype that is not read here; known: {', '.join(DTYPES)}")
        tensor = torch.empty(self.shape if shape is None else shape, dtype=self.dtype)
        left = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + first * tensor.element_size())
            while left:
                count = file.readinto(left)
                if not count:
                    raise DataError(f"{self.path} is truncated ({self.name} ends too early); copy it again")
                left = left[count:]
        return tensor

    def slice(self, index: int) -> Tensor:
        """Entry `index` of the first dimension."""
        return self.read(first=index * prod(self.shape[1:]), shape=self.shape[1:])

    def parts(self, elements: int = 1 << 20) -> Iterator[Tensor]:
        """All of it in order, flat, at most so many elements at a time."""
        total = prod(self.shape)
        for first in range(0, total, elements):
            yield self.read(first=first, shape=(min(elements, total - first),))


class TensorFiles(Mapping[str, Tensor]):
    """Name -> tensor, read afresh each time; DataError for a shard that is missing, cut short or something else."""

    def __init__(self, folder: Path):
        self.paths = shard_paths(folder)
        self.places: dict[str, Place] = {}
        for path in self.paths:
            self.places |= read_places(path)

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def read_places(path: Path) -> dict[str, Place]:
    """The header of one safetensors file: 8 bytes of length, JSON, then the bytes of the tensors."""
    with open_safetensors(path), path.open("rb") as file:  # the library checks header and length
        length = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(length))
    table.pop("__metadata__", None)
    return {
        name: Place(
            path, name, 8 + length + entry["data_offsets"][0], DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        )
        for name, entry in table.items()
    }


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in name order; DataError naming the one that is missing or broken.

    Where there are both a single file and an index, the single file, as transformers has it.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not index.is_file():
        raise DataError(f"{folder} has neither {SINGLE} nor {INDEX}; only safetensors are read")
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        paths = [folder / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} cannot be read: {first_line(error)}; copy it again") from error
    for path in paths:
        if path.parent != folder:
            raise DataError(f"{index} names {path.relative_to(folder)}, which is not beside it; shards are")
        if not path.is_file():
            raise DataError(f"{path} is missing ({INDEX} lists it); copy the shard again")
        with open_safetensors(path) as file:
            listed = {name for name, shard in weight_map.items() if shard == path.name}
            absent = sorted(listed - set(file.keys()))
        if absent:
            raise DataError(f"{path} lacks {absent[0]}, which {INDEX} says it holds; copy the shard again")
    return paths


def open_safetensors(path: Path) -> safe_open:
    """An open safetensors file; DataError naming it when it is cut short or is something else."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        read_header(path)  # says how many bytes are missing
        raise DataError(f"{path} is not safetensors ({first_line(error)}); copy it again") from error
