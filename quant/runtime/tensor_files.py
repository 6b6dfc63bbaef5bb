"""The tensors of a model folder, read one at a time with plain reads: nothing stays mapped, memory is what is kept.

files = TensorFiles("exports/scout-int4")
"lm_head.weight" in files;  files.dtype("lm_head.weight");  files.read("lm_head.weight")
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from herd.run.errors import DataError
from quant.sources import shard_paths

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie."""

    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFiles(Mapping[str, Tensor]):
    """Name -> tensor, read afresh each time; DataError for a shard that is missing, cut short or of a strange dtype."""

    def __init__(self, folder: Path):
        self.places: dict[str, Place] = {}
        for path in shard_paths(folder):
            self.places |= read_places(path)

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        raw = torch.empty(place.nbytes, dtype=torch.uint8)
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.offset)
            view = memoryview(raw.numpy())
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise DataError(f"{place.path} is truncated ({name} ends too early); copy it again")
                view = view[count:]
        return raw.view(place.dtype).view(place.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def read_places(path: Path) -> dict[str, Place]:
    """The header of one safetensors file (8 bytes of length, JSON, then the bytes of the tensors)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(length))
    table.pop("__metadata__", None)
    places = {}
    for name, entry in table.items():
        if entry["dtype"] not in _DTYPES:
            raise DataError(f"{path}: {name} is of dtype {entry['dtype']}; known: {', '.join(_DTYPES)}")
        begin, end = entry["data_offsets"]
        places[name] = Place(path, 8 + length + begin, end - begin, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return places
