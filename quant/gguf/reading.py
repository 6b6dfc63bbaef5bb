"""A GGUF file as a bf16 transformers model: every value is that of gguf's own dequantiser, rounded to bf16.

model = load_gguf(folder)                       # config.json beside the file says which architecture
values = read_values(folder / MODEL)            # key -> content;  headers = read_headers(...)
"""

import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from herd.run.errors import DataError, first_line
from quant.architectures import assemble, build_skeleton
from quant.gguf.layout import ROPE_FACTORS, Entry, layout
from quant.sources import read_config

MODEL = "model.gguf"


def open_gguf(path: Path) -> gguf.GGUFReader:
    """The file mapped into memory; DataError when it is cut short or is something else."""
    if not path.is_file():
        raise DataError(f"{path} is missing; export again")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise DataError(f"{path} is truncated or not GGUF ({first_line(error)}); copy it again") from error


def read_values(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Every key with its content, without those of the file format itself."""
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def read_headers(reader: gguf.GGUFReader) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape (outermost first) of every tensor."""
    return {t.name: (t.tensor_type.name, tuple(int(n) for n in reversed(t.shape))) for t in reader.tensors}


def described(config: PretrainedConfig) -> tuple[str, set[str]]:
    """The type of the quantised layers and the layers left alone, as config.json has them."""
    section = config.to_dict()["quantization_config"]
    return section["type"], set(section["ignore"])


def entries_of(config: PretrainedConfig) -> list[Entry]:
    """The tensors that config.json calls for."""
    kind, ignored = described(config)
    skeleton = build_skeleton(config)
    linears = {name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
    return layout(config, skeleton, linears - ignored, kind)


def load_gguf(folder: Path) -> PreTrainedModel:
    """The model in evaluation mode, one module an expert; DataError when a tensor is missing or of another shape."""
    values = GgufValues(folder)
    return assemble(values.config, values.of(values.names)).eval().requires_grad_(False)


class GgufValues:
    """The model's tensors that a file holds; DataError when one is missing or of another shape."""

    def __init__(self, folder: Path):
        self.config = read_config(folder)
        self._reader = open_gguf(folder / MODEL)
        found = {tensor.name: tensor for tensor in self._reader.tensors}
        self._sources: dict[str, tuple[Entry, gguf.ReaderTensor]] = {}
        for entry in entries_of(self.config):
            tensor = found.get(entry.name)
            if tensor is None or tensor.tensor_type.name != entry.kind or tensor.n_elements != np.prod(entry.shape):
                raise DataError(f"{folder / MODEL}: {entry.name} is missing or not {entry.kind} {list(entry.shape)}")
            if entry.name != ROPE_FACTORS:
                self._sources |= dict.fromkeys(entry.sources, (entry, tensor))

    @property
    def names(self) -> Iterable[str]:
        """Of all tensors, as the model has them."""
        return self._sources.keys()

    def of(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of the named tensors that the file holds, with all that are stacked with one of them."""
        asked = map(self._sources.get, self._sources.keys() & set(names))
        entries = {entry.name: (entry, tensor) for entry, tensor in asked}
        state: dict[str, Tensor] = {}
        for entry, tensor in entries.values():
            state |= values_of(entry, tensor.data)
            release(self._reader)
        return state


def release(reader: gguf.GGUFReader) -> None:
    """Let go of the pages of the mapped file that were read: they count as this process's memory otherwise."""
    reader.data.base.madvise(mmap.MADV_DONTNEED)


def values_of(entry: Entry, data: np.ndarray) -> dict[str, Tensor]:
    """The model's bf16 tensors that one tensor of the file holds."""
    kind = gguf.GGMLQuantizationType[entry.kind]
    values = torch.from_numpy(np.array(gguf.quants.dequantize(data, kind), dtype=np.float32)).view(entry.shape)
    parts = [values] if len(entry.sources) == 1 else values.unbind(0)
    return {
        source: entry.restore(part).to(torch.bfloat16).contiguous()
        for source, part in zip(entry.sources, parts, strict=True)
    }
