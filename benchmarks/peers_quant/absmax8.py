"""Meta's recipe for the Int4 Llama 4 (llama-models): absmax / 8 a group of 128, rounded to nearest, fp32 scales."""

from protocol import read_job
from torch import Tensor


def dequantised(weight_NK: Tensor, group: int) -> Tensor:
    """The weight as the recipe stores it; its largest positive value is clipped to 7 / 8."""
    grouped = weight_NK.float().unflatten(1, (-1, group))
    scale = (grouped.abs().amax(-1, keepdim=True) / 8).clamp(min=1e-12)
    return ((grouped / scale).round().clamp(-8, 7) * scale).flatten(1)


def main() -> None:
    job = read_job()
    group = job.settings["group_size"]
    weights = job.matrices()
    with job.timed():
        made = {name: dequantised(weight_NK, group) for name, weight_NK in weights.items()}
    job.finish(made, bits=4 + 32 / group, peer="torch")


if __name__ == "__main__":
    main()
