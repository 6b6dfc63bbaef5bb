"""A model folder, ready to be scored: plain HF folders and quantised exports alike.

loaded = load("runs/nano/students/scout"); loaded.model(input_ids=...)
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import quant
from evals.footprint import measure_disk
from herd.data.tokenizer import load_tokenizer
from herd.llama4 import use_sparse_experts
from herd.llama4.source import open_model
from herd.run.errors import ConfigError, DataError
from herd.run.lineage import read_lineage


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with what its folder says about it. `lineage` is empty for foreign folders."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lineage: dict[str, Any]

    @property
    def name(self) -> str:
        return self.lineage.get("name", self.folder.name)


def load(folder: str | Path, *, device: str = "cpu") -> Loaded:
    """Load model, tokenizer and lineage. Raises ConfigError or DataError for a folder that is not a whole model."""
    folder = Path(folder)
    check_folder(folder)
    return Loaded(folder, load_model(folder, device=device), load_tokenizer(folder), read_lineage(folder))


def check_folder(folder: Path) -> None:
    """Fail early and in one line if this is not a model folder; truncated weight files are found here too."""
    if not folder.is_dir():
        raise ConfigError(f"model folder {folder}: does not exist; give the folder of a saved model")
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no config.json; give the folder of a saved model")
    measure_disk(folder)


def load_model(folder: Path, *, device: str = "cpu") -> PreTrainedModel:
    """The model alone, in the type it was saved in, evaluation mode, Llama 4 experts dispatched sparsely."""
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" in config:
        model = quant.load(folder, device=device)  # in low bits on a CPU; routes its experts itself
    else:
        model = use_sparse_experts(open_model(str(folder), dtype="auto"))
    return model.to(device).eval()
