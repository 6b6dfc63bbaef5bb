"""GPTQModel on the CPU, through its own export; its codes are unpacked here ([K / 8, N] words of int32)."""

import json
import os

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from protocol import QUANTISED, read_job
from safetensors.torch import load_file
from torch import Tensor

SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


def unpacked(stored: dict[str, Tensor], name: str, offset: int) -> Tensor:
    """The weight [N, K] of one layer; zeros are stored less `offset`."""
    codes_KN = ((stored[f"{name}.qweight"][:, None] >> SHIFTS[:, None]) & 15).flatten(0, 1)
    zeros_GN = ((stored[f"{name}.qzeros"][:, :, None] >> SHIFTS) & 15).flatten(1, 2) + offset
    group_K = stored[f"{name}.g_idx"].long()
    return (stored[f"{name}.scales"].float()[group_K] * (codes_KN - zeros_GN[group_K]).float()).T


def main() -> None:
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its pool refuses the one that a machine of two cores gets
    job = read_job()
    group = job.settings["group_size"]
    kept = {"-:.*self_attn.*": {}, "-:.*router.*": {}, "-:.*lm_head.*": {}}
    config = QuantizeConfig(bits=4, group_size=group, sym=True, desc_act=False, device="cpu", dynamic=kept)
    model = GPTQModel.load(str(job.model), config)
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
