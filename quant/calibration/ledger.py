"""Finished decoder layers on disk, so that a command killed at any moment goes on from the last of them.

    ledger = Ledger(folder, fingerprint)            # another fingerprint's layers are deleted; None: in memory
    ledger.finished                                 # layers 0 .. finished - 1 are whole
    ledger.add(3, tensors, facts);  ledger.tensors(3)["..."];  ledger.facts(3)

A layer counts once its marker is there, which is written last, after its tensors have been flushed and renamed.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from herd.run.files import disk_faults, fresh_folder, write_atomic
from quant.tensor_files import read_places

FINGERPRINT = "fingerprint.json"


class Ledger:
    def __init__(self, folder: Path | None, fingerprint: Mapping[str, Any]):
        self.folder = folder
        self._tensors: dict[int, dict[str, Tensor]] = {}
        self._facts: dict[int, dict[str, Any]] = {}
        self.dropped: str | None = None
        """Which fact differed when layers of an earlier command could not be used."""
        if folder is not None:
            self._open(folder, json.loads(json.dumps(fingerprint)))

    @property
    def finished(self) -> int:
        """How many layers, from the first on, are whole."""
        if self.folder is None:
            return len(self._facts)
        count = 0
        while self._marker(count).is_file():
            count += 1
        return count

    def add(self, layer: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep the stored tensors of a decoder layer and what calibration saw of it."""
        if self.folder is None:
            self._tensors[layer], self._facts[layer] = dict(tensors), dict(facts)
            return
        path = self._path(layer)
        temporary = path.with_suffix(".part")
        with disk_faults(path):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        write_atomic(self._marker(layer), json.dumps(facts))  # flushes the folder too

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """The stored tensors of a finished layer."""
        if self.folder is None:
            return self._tensors[layer]
        return {name: place.read() for name, place in read_places(self._path(layer)).items()}

    def facts(self, layer: int) -> dict[str, Any]:
        """What was noted of a finished layer."""
        return self._facts[layer] if self.folder is None else json.loads(self._marker(layer).read_text())

    def remember(self, name: str, find: Callable[[], int]) -> int:
        """A number that is found once and kept."""
        if self.folder is None:
            return find()
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_atomic(path, json.dumps(find()))
        return json.loads(path.read_text())

    def _open(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        path = folder / FINGERPRINT
        if path.is_file():
            earlier = json.loads(path.read_text())
            differing = [key for key in fingerprint if fingerprint[key] != earlier.get(key)]
            if not differing:
                return
            self.dropped = differing[0]
        write_atomic(fresh_folder(folder) / FINGERPRINT, json.dumps(fingerprint, indent=1))

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def _marker(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.json"
