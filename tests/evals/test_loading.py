"""A folder that is not a whole model is refused in one line; a whole one comes back in evaluation mode."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evals.loading import load
from herd.run.errors import ConfigError, DataError
from tests.evals.tiny import save_tiny, tiny_model


def test_a_loaded_model_has_the_saved_weights_and_does_not_drop_out(tmp_path: Path) -> None:
    loaded = load(save_tiny(tmp_path / "scout", 3))
    assert loaded.name == "scout" and not loaded.model.training
    for name, weight in tiny_model(3).state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight)


def test_missing_weights_are_an_error_not_a_random_layer(tmp_path: Path) -> None:
    file = save_tiny(tmp_path, 0) / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"1 weights are missing, first model.layers.1.mlp.up_proj.weight"):
        load(tmp_path)


def test_a_folder_that_does_not_exist_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "nowhere")


def test_a_folder_without_configuration_is_no_model(tmp_path: Path) -> None:
    (save_tiny(tmp_path, 0) / "config.json").unlink()
    with pytest.raises(DataError, match=r"no config\.json"):
        load(tmp_path)


def test_a_truncated_weight_file_is_named(tmp_path: Path) -> None:
    file = save_tiny(tmp_path, 0) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load(tmp_path)
