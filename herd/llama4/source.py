"""Opens any causal language model by name: a spec of the herd, a model folder, or a hub id.

model = open_model("scout-nano", vocabulary={"vocab_size": 4096}, dtype=torch.bfloat16, seed=0)
model = open_model("runs/nano/teacher", dtype=torch.float32)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from herd.llama4.model import build
from herd.llama4.specs import SPECS
from herd.run import bf16_products, hub
from herd.run.errors import ConfigError, DataError
from herd.run.weight_files import check_whole


def is_spec(source: str) -> bool:
    """True for a name in SPECS, false for a folder or a hub id."""
    return source in SPECS


def open_model(
    source: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    vocabulary: Mapping[str, int] | None = None,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """The model, in `dtype` ("auto": the one it was saved in).

    `overrides` and `vocabulary` (sizes and special ids) apply to specs only.
    Raises ConfigError for a name that is neither a spec nor a folder nor a hub id, and for overrides of a model that
    exists; DataError for a folder that cannot be read; EnvironmentFault for a hub that does not answer.
    """
    if is_spec(source):
        return build(source, overrides={**(vocabulary or {}), **(overrides or {})}, dtype=dtype, seed=seed)
    _check_existing(source, overrides)
    check_whole(Path(source))
    bf16_products.install()
    try:
        with hub.asked(f"model {source}", source=source):
            model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:  # RuntimeError: shapes that differ
        raise _unreadable(source, error) from error
    if info["missing_keys"]:  # transformers would start them at random
        missing = sorted(info["missing_keys"])
        raise DataError(f"model {source}: {len(missing)} weights are missing, first {missing[0]}; export it again")
    return model


def read_config(
    source: str, *, overrides: Mapping[str, Any] | None = None, vocabulary: Mapping[str, int] | None = None
) -> PretrainedConfig:
    """The text configuration of what `open_model` would open, without its weights. Same errors."""
    if is_spec(source):
        return SPECS[source].config(**{**(vocabulary or {}), **(overrides or {})})
    _check_existing(source, overrides)
    try:
        with hub.asked(f"model {source}", source=source):
            return AutoConfig.from_pretrained(source).get_text_config()
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error


def _check_existing(source: str, overrides: Mapping[str, Any] | None) -> None:
    if not Path(source).is_dir() and not (hub.is_id(source) and "/" in source):
        raise ConfigError(f"model source {source!r}: no such spec or folder; specs are {', '.join(SPECS)}")
    if overrides:
        raise ConfigError(
            f"overrides = {dict(overrides)}: only a model built from a spec can be changed, {source} exists already; "
            "remove the overrides or name a spec"
        )


def _unreadable(source: str, error: Exception) -> DataError:
    cause = " ".join(str(error).split())
    return DataError(f"model {source}: cannot be read: {cause[:300]}; is the folder complete?")
