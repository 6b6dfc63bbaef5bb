"""The hidden states of the calibration rows between two decoder layers: in memory, or in one file a layer.

    states = Activations(folder, "hidden", shapes)                   # None: in memory
    states.write(0, batches);  for hidden_BTH in states.read(0): ...

A file is whole once its block ends: it is written under another name, flushed and renamed. bf16 throughout.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from herd.run.files import disk_faults, sync_folder


class Activations:
    def __init__(self, folder: Path | None, name: str, shapes: list[tuple[int, ...]]):
        """name: of the files, `name-00003.bin`. shapes: [B, T, H] of every batch."""
        self._folder = folder
        self._name = name
        self._shapes = shapes
        self._held: dict[int, list[Tensor]] = {}

    def write(self, layer: int, batches: Iterable[Tensor]) -> None:
        """Keep what enters a layer, batch after batch."""
        with self.writing(layer) as put:
            for batch in batches:
                put(batch)

    @contextmanager
    def writing(self, layer: int) -> Iterator[Callable[[Tensor], None]]:
        """The same for batches that come one by one."""
        if self._folder is None:
            batches = self._held[layer] = []
            yield lambda batch: batches.append(batch.to(torch.bfloat16))
            return
        path = self._path(layer)
        temporary = path.with_suffix(".part")
        with disk_faults(path), temporary.open("wb") as file:

            def put(batch: Tensor) -> None:
                file.write(memoryview(batch.to(torch.bfloat16).contiguous().view(torch.int16).numpy()).cast("B"))

            yield put
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(self._folder)

    def read(self, layer: int) -> Iterator[Tensor]:
        """What enters a layer, batch after batch, one in memory at a time."""
        if self._folder is None:
            yield from self._held[layer]
            return
        with self._path(layer).open("rb") as file:
            for shape in self._shapes:
                raw = np.fromfile(file, dtype=np.int16, count=int(np.prod(shape)))
                yield torch.from_numpy(raw).view(torch.bfloat16).view(shape)

    def drop(self, layer: int) -> None:
        """Forget what entered a layer."""
        self._held.pop(layer, None)
        if self._folder is not None:
            self._path(layer).unlink(missing_ok=True)

    def _path(self, layer: int) -> Path:
        return self._folder / f"{self._name}-{layer:05d}.bin"
