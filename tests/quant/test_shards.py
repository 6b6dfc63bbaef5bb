"""The streaming safetensors writer, read back by the safetensors library."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from quant.shards import write_shards
from quant.tensor_files import TensorFiles

TENSORS = {
    "shape": torch.tensor([3, 5]),
    "scale": torch.randn(3, 1).bfloat16(),
    "codes": torch.randn(3, 5).to(torch.float8_e4m3fn),
    "packed": torch.randint(-(2**31), 2**31 - 1, (3, 2), dtype=torch.int32),
    "norm": torch.randn(7).bfloat16(),
    "flag": torch.tensor(True),
}
HEADERS = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    raw = [tensor.reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(*raw)


def test_one_file_holds_every_tensor(tmp_path: Path):
    digests = write_shards(tmp_path, HEADERS, TENSORS)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys() == digests.keys()
    assert all(same(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_every_tensor_is_aligned_to_its_width(tmp_path: Path):
    write_shards(tmp_path, HEADERS, TENSORS)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert (8 + length + table[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_shards_and_index_hold_every_tensor_once_and_no_shard_exceeds_the_limit(tmp_path: Path):
    write_shards(tmp_path, HEADERS, TENSORS, shard_bytes=32)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    found = {}
    for file in files:
        part = load_file(file)
        assert sum(t.nbytes for t in part.values()) <= 32
        assert found.keys().isdisjoint(part)
        assert all(index["weight_map"][name] == file.name for name in part)
        found |= part
    assert all(same(found[name], tensor) for name, tensor in TENSORS.items())
    assert all(same(TensorFiles(tmp_path)[name], tensor) for name, tensor in TENSORS.items())


def test_a_tensor_larger_than_the_limit_gets_its_own_file(tmp_path: Path):
    write_shards(tmp_path, HEADERS, TENSORS, shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(TENSORS)
