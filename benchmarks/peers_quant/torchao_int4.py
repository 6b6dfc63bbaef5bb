"""torchao's prototype int4 for CPUs (the stable one needs a CUDA library), matrix by matrix, with its two scale rules.

Its weights are packed for the kernel; what the kernel computes for the unit vectors is the dequantised weight.
"""

import torch
from protocol import read_job
from torch import nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import quantize_
from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm


@torch.inference_mode()
def main() -> None:
    job = read_job()
    group = job.settings["group_size"]
    algorithm = Int4ChooseQParamsAlgorithm(job.settings["algorithm"])
    config = PrototypeInt4WeightOnlyConfig(
        group_size=group, int4_choose_qparams_algorithm=algorithm, set_inductor_config=False
    )
    layers = {}
    for name, weight_NK in job.matrices().items():
        layers[name] = nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=False, dtype=torch.bfloat16)
        layers[name].weight.copy_(weight_NK)
    with job.timed():
        for layer in layers.values():
            quantize_(layer, config)
    made = {name: layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).T for name, layer in layers.items()}
    job.finish(made, bits=4 + 32 / group, peer="torchao")


if __name__ == "__main__":
    main()
