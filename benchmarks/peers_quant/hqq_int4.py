"""HQQ's own quantiser, matrix by matrix, groups along the inputs; scales and zeros are 16 bits wide."""

import torch
from hqq.core.quantize import Quantizer
from protocol import read_job


def main() -> None:
    job = read_job()
    group = job.settings["group_size"]
    weights = job.matrices()
    with job.timed():
        packed = {
            name: Quantizer.quantize(
                weight_NK, nbits=4, group_size=group, optimize=True, axis=1, device="cpu", compute_dtype=torch.bfloat16
            )
            for name, weight_NK in weights.items()
        }
    made = {}
    for name, (codes, meta) in packed.items():
        # Stored as bf16, as HQQLinear does for this compute type.
        meta |= {key: meta[key].to(torch.bfloat16) for key in ("scale", "zero")}
        made[name] = Quantizer.dequantize(codes, meta)
    job.finish(made, bits=4 + 32 / group, peer="hqq")


if __name__ == "__main__":
    main()
