"""Writes a GGUF file tensor by tensor: no more than the experts of one layer are held.

digests = write_gguf(folder / MODEL, entries, values, tensors)         # sha256 of each tensor's bytes in the file
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from herd.data.tokenizer import TOKENIZER_FILES, load_tokenizer
from quant.gguf.layout import ROPE_FACTORS, Entry
from quant.gguf.metadata import metadata, rope_factors
from quant.gguf.tokenizer import tokenizer_metadata

ARCHITECTURE = "general.architecture"


def write_gguf(
    path: Path, config: PretrainedConfig, entries: list[Entry], values: dict[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Write the file; returns the sha256 of every tensor as it was in memory, by its name in the file.

    tensors: the export's, by the model's names (`...up_proj.blocks` for quantised layers, else the tensor itself).
    Same content: same bytes.
    """
    writer = gguf.GGUFWriter(path, arch=values[ARCHITECTURE])
    for key, value in values.items():
        if key != ARCHITECTURE:  # the writer has added it
            _add(writer, key, value)
    for entry in entries:
        dtype = np.float32 if entry.kind == "F32" else np.uint8
        shape = entry.shape if entry.kind == "F32" else entry.byte_shape
        kind = gguf.GGMLQuantizationType[entry.kind]
        writer.add_tensor_info(entry.name, shape, np.dtype(dtype), entry.bytes, raw_dtype=kind)
    digests: dict[str, str] = {}
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            content = content_of(entry, config, tensors)
            writer.write_tensor_data(content)
            digests[entry.name] = hashlib.sha256(memoryview(content).cast("B")).hexdigest()
        writer.flush()
    finally:
        writer.close()
    return digests


def describe_model(folder: Path, config: PretrainedConfig, name: str) -> dict[str, Any]:
    """All keys of the file that belongs into a folder with this configuration and tokenizer (or none)."""
    present = any((folder / file).is_file() for file in TOKENIZER_FILES)
    kind = config.to_dict()["quantization_config"]["type"]
    tokenizer = tokenizer_metadata(load_tokenizer(folder) if present else None, config.vocab_size)
    return metadata(config, kind=kind, name=name) | tokenizer


def content_of(entry: Entry, config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> np.ndarray:
    """The tensor as it lies in the file."""
    if entry.name == ROPE_FACTORS:
        return rope_factors(config).numpy()
    parts = [entry.arrange(_raw(entry, tensors, source)) for source in entry.sources]
    stacked = parts[0] if len(entry.shape) == parts[0].ndim else torch.stack(parts)
    return np.ascontiguousarray(stacked.numpy())


def _raw(entry: Entry, tensors: Mapping[str, Tensor], source: str) -> Tensor:
    if entry.kind == "F32":
        return tensors[source].float()
    if entry.kind == "BF16":
        return tensors[source].contiguous().view(torch.uint8)
    return tensors[source.removesuffix(".weight") + ".blocks"]


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One value in the type llama.cpp expects: numbers as 32 bits."""
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING,
    }
    if isinstance(value, list):
        element = gguf.GGUFValueType.INT32 if isinstance(value[0], int) else gguf.GGUFValueType.STRING
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=element)
    else:
        writer.add_key_value(key, value, kinds[type(value)])
