"""Bytes and bits per weight from file headers, against files of known content."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evals.footprint import count_parameters, measure_disk
from herd.run.errors import DataError
from tests.evals.tiny import tiny_model

OUT, IN, GROUP = 64, 128, 32


def save_quantised(folder: Path) -> None:
    """A packed int4 layer with bf16 scales, an fp8 layer, and an embedding stored as it is."""
    save_file(
        {
            "model.embed.weight": torch.zeros(100, 16, dtype=torch.bfloat16),
            "a.q_proj.weight_packed": torch.zeros(OUT, IN // 8, dtype=torch.int32),
            "a.q_proj.weight_scale": torch.zeros(OUT, IN // GROUP, dtype=torch.bfloat16),
            "a.q_proj.weight_shape": torch.tensor([OUT, IN]),
            "a.q_proj.bias": torch.zeros(OUT, dtype=torch.bfloat16),
            "b.up_proj.weight": torch.zeros(OUT, IN, dtype=torch.float8_e4m3fn),
            "b.up_proj.weight_scale": torch.zeros(OUT, 1, dtype=torch.bfloat16),
        },
        folder / "model.safetensors",
    )


def test_bits_per_weight_counts_scales_and_keeps_plain_weights_apart(tmp_path: Path) -> None:
    save_quantised(tmp_path)
    disk = measure_disk(tmp_path)
    plain = 100 * 16 + OUT
    quantised = 2 * OUT * IN
    packed_bytes = OUT * IN // 2 + OUT * IN // GROUP * 2 + 16
    fp8_bytes = OUT * IN + OUT * 2
    parameters = plain + quantised
    assert disk.bits_per_weight(parameters) == 8 * (2 * plain + packed_bytes + fp8_bytes) / parameters
    assert disk.quantised_bits_per_weight(parameters) == 8 * (packed_bytes + fp8_bytes) / quantised


def test_plain_weights_cost_their_type(tmp_path: Path) -> None:
    model = tiny_model(0).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    disk = measure_disk(tmp_path)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(tmp_path) == parameters
    assert disk.bits_per_weight(parameters) == 16
    assert disk.quantised_bits_per_weight(parameters) is None
    assert disk.folder == sum(file.stat().st_size for file in tmp_path.iterdir()) > disk.weight_files


def test_tied_weights_are_counted_once(tmp_path: Path) -> None:
    model = tiny_model(0)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert count_parameters(tmp_path) == sum(parameter.numel() for parameter in model.parameters())
    assert measure_disk(tmp_path).bits_per_weight(count_parameters(tmp_path)) == 32


@pytest.mark.parametrize("kept", [3, 200, 5000])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    save_quantised(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"model\.safetensors.*again"):
        measure_disk(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \*\.safetensors"):
        measure_disk(tmp_path)
