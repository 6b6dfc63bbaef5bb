"""GPTQModel on the CPU, through its own export; its codes are unpacked here ([K / 8, N] words of int32).

7.6.0 takes Llama 4's fused experts apart without transposing them: other weights than the model's are calibrated and
stored. Square experts pass unnoticed; with `mend` it gets them transposed beforehand and ends up with the right ones.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from protocol import FUSED, QUANTISED, Job, read_job
from safetensors.torch import load_file, save_file
from torch import Tensor

SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


def unpacked(stored: dict[str, Tensor], name: str, offset: int) -> Tensor:
    """The weight [N, K] of one layer; zeros are stored less `offset`."""
    codes_KN = ((stored[f"{name}.qweight"][:, None] >> SHIFTS[:, None]) & 15).flatten(0, 1)
    zeros_GN = ((stored[f"{name}.qzeros"][:, :, None] >> SHIFTS) & 15).flatten(1, 2) + offset
    group_K = stored[f"{name}.g_idx"].long()
    return (stored[f"{name}.scales"].float()[group_K] * (codes_KN - zeros_GN[group_K]).float()).T


def transposed(job: Job) -> Path:
    """A copy of the model folder with every square expert matrix transposed."""
    folder = job.out / "transposed"
    shutil.copytree(job.model, folder, dirs_exist_ok=True)
    tensors = job.tensors()
    for name, tensor in tensors.items():
        if FUSED.match(name):
            halves = tensor.split(tensor.shape[1], dim=2)
            assert all(half.shape[1] == half.shape[2] for half in halves), f"{name}: experts are not square"
            tensors[name] = torch.cat([half.mT for half in halves], dim=2).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def main() -> None:
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its pool refuses the one that a machine of two cores gets
    job = read_job()
    group = job.settings["group_size"]
    kept = {"-:.*self_attn.*": {}, "-:.*router.*": {}, "-:.*lm_head.*": {}}
    config = QuantizeConfig(bits=4, group_size=group, sym=True, desc_act=False, device="cpu", dynamic=kept)
    model = GPTQModel.load(str(transposed(job) if job.settings.get("mend") else job.model), config)
    rows = [{"input_ids": row_T, "attention_mask": torch.ones_like(row_T)} for row_T in job.rows()]
    with job.timed():
        model.quantize(rows, batch_size=8)
    export = job.out / "export"
    model.save(str(export))
    stored = {n: t for path in export.glob("*.safetensors") for n, t in load_file(path).items()}
    settings = json.loads((export / "config.json").read_text())["quantization_config"]
    offset = 1 if settings.get("checkpoint_format", settings.get("format", "gptq")) == "gptq" else 0
    names = [n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")]
    assert all(QUANTISED.search(name) for name in names), names
    weights = {name: unpacked(stored, name, offset) for name in names}
    job.finish(weights, bits=4 + 20 / group, peer="gptqmodel")


if __name__ == "__main__":
    main()
