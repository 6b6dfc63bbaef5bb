"""Bytes a model folder takes and bits it spends per weight, read from the files' headers; no weight is loaded.

disk = measure_disk(folder); parameters = count_parameters(folder)
"""

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from herd.run.errors import DataError
from herd.run.weight_files import read_header

# A module with one of these beside its weight is stored quantised (compressed-tensors, fine-grained fp8, NF4).
_MARKS = (".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight.absmax")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    name: str
    elements: int
    data_bytes: int
    in_blocks: bool = False
    """Of quantised weights (GGUF)."""


@dataclass(frozen=True)
class Disk:
    """Sizes in bytes. `plain_elements` counts the elements of tensors that are stored as they are."""

    weight_files: int
    folder: int
    tensors: int
    quantised_tensors: int
    plain_elements: int

    def bits_per_weight(self, parameters: int) -> float:
        """Stored bits (scales, zero points and shapes included) per parameter of the unquantised architecture."""
        return 8 * self.tensors / parameters

    def quantised_bits_per_weight(self, parameters: int) -> float | None:
        """The same over quantised layers alone: whatever is not stored as it is must be quantised."""
        quantised = parameters - self.plain_elements
        return 8 * self.quantised_tensors / quantised if self.quantised_tensors else None


def measure_disk(folder: str | Path) -> Disk:
    """Sizes of a model folder. Raises DataError when it has no readable safetensors file."""
    folder = Path(folder)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])
    if not files:
        raise DataError(f"{folder}: no *.safetensors or *.gguf file; give the folder of a saved model")
    stored = [tensor for file in files for tensor in _read(file)]
    modules = {tensor.name[: -len(mark)] for tensor in stored for mark in _MARKS if tensor.name.endswith(mark)}
    quantised = [tensor for tensor in stored if tensor.in_blocks or _module(tensor.name) in modules]
    quantised_names = {tensor.name for tensor in quantised}
    return Disk(
        weight_files=sum(file.stat().st_size for file in files),
        folder=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        tensors=sum(tensor.data_bytes for tensor in stored),
        quantised_tensors=sum(tensor.data_bytes for tensor in quantised),
        plain_elements=sum(tensor.elements for tensor in stored if tensor.name not in quantised_names),
    )


def _module(name: str) -> str:
    """`a.q_proj` for `a.q_proj.weight_scale`, `.weight.absmax` and `.input_scale`; its bias is stored as it is."""
    return re.split(r"\.(?:weight|input)(?=[_.]|$)", name)[0]


def _read(file: Path) -> list[Stored]:
    return _read_gguf(file) if file.suffix == ".gguf" else [_stored(*one) for one in read_header(file).items()]


def _read_gguf(file: Path) -> list[Stored]:
    from quant.gguf.reading import open_gguf

    return [
        Stored(tensor.name, int(tensor.n_elements), int(tensor.n_bytes), tensor.tensor_type.name.startswith("Q"))
        for tensor in open_gguf(file).tensors
    ]


def _stored(name: str, facts: dict) -> Stored:
    begin, end = facts["data_offsets"]
    return Stored(name, prod(facts["shape"]), end - begin)


def count_parameters(folder: str | Path) -> int:
    """Parameters of the folder's architecture before quantisation (meta device, tied weights once)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if "quantization_config" in config.to_dict():
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())
