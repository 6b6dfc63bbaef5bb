"""This package, in its own environment, on the same rows; the time is that of quantising, without the export's gate."""

import re
from dataclasses import replace

import torch
import transformers
from protocol import kept_of, read_job
from torch import nn

import quant
from quant.calibration.rows import CalibrationRows
from quant.calibration.settings import Calibration

# The rows are the same for all peers: none is drawn for the sake of rare experts.
FIXED = {"expert_tokens": 0}


def main() -> None:
    transformers.logging.set_verbosity_error()
    job = read_job()
    rows_NT = job.rows()
    calibration = None
    if job.settings.get("method", "rtn") not in ("rtn", "hqq"):
        calibration = Calibration(CalibrationRows(rows_NT), first=len(rows_NT), **FIXED)
    names = job.matrices().keys()
    attention = any(not re.search(r"\.feed_forward\.", name) for name in names)  # a Llama 4 keeps it in any case
    with job.timed():
        quantized = quant.quantize(
            job.model, ignore=["*.self_attn.*"] if attention else [], calibration=calibration, **job.settings
        )
        tensors = dict(quantized.tensors.items())
    model = replace(quantized, tensors=tensors).model
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n in names}
    assert weights.keys() == names
    if job.settings["scheme"] == "fp8":
        codes = {n: tensors[f"{n}.weight"].view(torch.uint8) for n in names}
        job.save_codes(codes, {n: tensors[f"{n}.weight_scale"] for n in names})
    bits = quantized.plan.bits_per_quantised_weight
    job.finish(weights, bits=bits, peer="torch", kept=kept_of(model, job.tensors()))


if __name__ == "__main__":
    main()
