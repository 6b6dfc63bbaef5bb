"""Where unquantised tensors come from: a model in memory, or a folder of safetensors read tensor by tensor.

with open_source(model_or_folder) as source:
    source.config                        # transformers configuration
    source.headers["lm_head.weight"]     # (dtype, shape), nothing read yet
    source.read("lm_head.weight")        # the tensor; read("...gate_up_proj", expert=3) one slice of it
"""

import json
import logging
import re
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from herd.run.errors import ConfigError, DataError, first_line
from herd.run.files import sha256
from quant.architectures import ADDING, SUPPORTED, build_skeleton, tied_names
from quant.tensor_files import TensorFiles

log = logging.getLogger(__name__)

COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings",
)  # fmt: skip
PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class ModelSource:
    """The parameters and buffers of a transformers model in memory."""

    def __init__(self, model: PreTrainedModel):
        # From its dictionary, without what a running model adds to it (attention implementation, tracing state).
        self.config = type(model.config).from_dict(model.config.to_dict() | {"architectures": [type(model).__name__]})
        self.generation = model.generation_config.to_diff_dict() if model.generation_config else {}
        self.place = "the model"
        self._tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.headers = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def identity(self) -> list[Any]:
        """What tells this source from another; of a model in memory nothing is kept, so nothing is needed."""
        return [self.place]

    def read(self, name: str, *, expert: int | None = None) -> Tensor:
        """The tensor, or one expert's slice of a fused one, on the CPU."""
        tensor = self._tensors[name]
        return (tensor if expert is None else tensor[expert]).cpu()

    def read_rows(self, name: str, rows_U: Tensor) -> Tensor:
        """Some rows of a matrix, in increasing order."""
        return self._tensors[name][rows_U.to(self._tensors[name].device)].cpu()

    def same(self, first: str, second: str) -> bool:
        """Whether two names hold the same values."""
        return torch.equal(self._tensors[first], self._tensors[second])

    def __enter__(self) -> "ModelSource":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


class FolderSource:
    """The safetensors of a Hugging Face folder, sharded in any way; only what is asked for is read."""

    def __init__(self, folder: Path):
        self.config = read_config(folder)
        check_sums(folder)
        self.generation = _read_generation(folder / "generation_config.json")
        self.place = str(folder)
        self._folder = folder
        self._files = TensorFiles(folder)
        # None: not a plain floating-point tensor, which is all that is quantised here.
        self.headers: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
            name: (place.dtype if place.dtype in PLAIN else None, place.shape)
            for name, place in self._files.places.items()
        }

    def identity(self) -> list[Any]:
        """Names and contents of its files: a folder that was moved, or written again unchanged, is the same source."""
        return [[path.name, sha256(path)] for path in (*self._files.paths, self._folder / "config.json")]

    def read(self, name: str, *, expert: int | None = None) -> Tensor:
        """The tensor, or one expert's slice of a fused one."""
        place = self._files.places[name]
        return place.read() if expert is None else place.slice(expert)

    def read_rows(self, name: str, rows_U: Tensor) -> Tensor:
        """Some rows of a matrix, in increasing order; nothing else of it is read."""
        return torch.stack([self._files.places[name].slice(row) for row in rows_U.tolist()])

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same values, read a part at a time."""
        one, other = self._files.places[first], self._files.places[second]
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and all(torch.equal(*parts) for parts in zip(one.parts(), other.parts(), strict=True))

    def __enter__(self) -> "FolderSource":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


Source = ModelSource | FolderSource


def open_source(model: PreTrainedModel | str | Path) -> Source:
    """A source of unquantised tensors; DataError when it is quantised already or its files are broken."""
    if not isinstance(model, PreTrainedModel | str | Path):
        raise ConfigError(f"model = {type(model).__name__}: give a transformers model or the path of its folder")
    source = ModelSource(model) if isinstance(model, PreTrainedModel) else FolderSource(Path(model))
    if isinstance(model, PreTrainedModel) and any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(f"model = {type(model).__name__} on the meta device: it has no weights; load them first")
    existing = source.config.to_dict().get("quantization_config")
    if existing:
        method = existing.get("quant_method", "unknown")
        raise DataError(f"{source.place}: already quantised (quant_method {method}); start from the unquantised model")
    _untie(source)
    return source


def _untie(source: Source) -> None:
    """Where the configuration ties two tensors that are stored with different values, both count, as for transformers.

    A head that was trained apart from its embeddings would otherwise be left out of the export.
    """
    if not source.config.get_text_config().tie_word_embeddings:
        return
    skeleton = build_skeleton(source.config, fused=True)
    for name in sorted(tied_names(skeleton) & source.headers.keys()):
        other = skeleton.all_tied_weights_keys[name]
        if other in source.headers and not source.same(name, other):
            log.warning("%s: config.json ties %s to %s, but they are stored apart and differ: both are kept, and the "
                        "export's config.json says so", source.place, name, other)  # fmt: skip
            for config in (source.config, source.config.get_text_config()):
                config.tie_word_embeddings = False
            return


def read_config(folder: Path) -> PretrainedConfig:
    """The transformers configuration of a folder; DataError when there is none or it cannot be read."""
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist; --model takes a Hugging Face model folder")
    try:
        content = PretrainedConfig.get_config_dict(folder, local_files_only=True)[0]
        section = content.get("quantization_config")
        if section is not None and not isinstance(section, dict):
            raise DataError(f"{path}: quantization_config = {section!r} is no mapping; leave it out, or copy it again")
        kind = content.get("model_type", "")
        if kind and kind not in CONFIG_MAPPING:
            raise DataError(
                f"{path}: model_type = {kind!r} is unknown to transformers {transformers.__version__}, "
                f"whose newer releases may know it; supported: {SUPPORTED}; {ADDING}"
            )
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except StrictDataclassError as error:  # which field on one line, what is wrong with it on the next
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    except (ValueError, KeyError, OSError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    check_values(config.get_text_config(), path)
    return config


def check_values(text: PretrainedConfig, path: Path) -> None:
    """Raise DataError for numbers with which a model can be built, or not even that, but not run."""
    for name in COUNTS:
        value = getattr(text, name, None)
        if isinstance(value, int) and value < 1:
            raise DataError(f"{path}: {name} = {value}: must be 1 or more")
    chosen, experts = (getattr(text, name, None) for name in ("num_experts_per_tok", "num_local_experts"))
    if chosen is not None and experts and not 1 <= chosen <= experts:  # some dense models say 0 of 0
        raise DataError(f"{path}: num_experts_per_tok = {chosen}: must be 1 to num_local_experts = {experts}")
    kinds = getattr(text, "layer_types", None) or []
    chunk = getattr(text, "attention_chunk_size", None)
    if "chunked_attention" in kinds and not (chunk and chunk > 0):
        raise DataError(f"{path}: attention_chunk_size = {chunk}: chunked attention needs 1 token or more")
    ropes = getattr(text, "no_rope_layers", None)
    if isinstance(ropes, list) and len(ropes) != text.num_hidden_layers:
        raise DataError(f"{path}: no_rope_layers has {len(ropes)} entries: must have one for each of "
                        f"num_hidden_layers = {text.num_hidden_layers}")  # fmt: skip


def check_sums(folder: Path) -> None:
    """Where the folder has a SHA256SUMS (as `sha256sum *` writes it), every listed file must be there and match."""
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        return
    for number, line in enumerate(sums.read_text(errors="replace").splitlines(), start=1):
        digest, _, name = line.partition(" ")
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise DataError(f"{sums}: line {number} is no checksum and name, as `sha256sum *` writes them; mend it")
        path = folder / name.strip().removeprefix("*")
        if not path.is_file():
            raise DataError(f"{path} is missing (SHA256SUMS lists it); copy it again")
        if sha256(path) != digest:
            raise DataError(f"{path} does not have the checksum that SHA256SUMS gives; copy it again")


def _read_generation(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
