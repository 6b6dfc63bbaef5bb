"""What every worker shares: it gets a bf16 folder and token rows, and leaves dequantised bf16 weights in that layout.

    job = read_job(); weights = job.matrices()          # {"...experts.3.up_proj": [N, K]}, what is to be quantised
    with job.timed(): ...                               # only the quantising
    job.finish(weights, bits=4.25, peer="bitsandbytes")

Needs torch, safetensors, numpy alone, so that it runs in every peer's environment. N outputs, K inputs, E experts.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

QUANTISED = re.compile(r"\.(mlp|feed_forward)\.(shared_expert\.|experts\.\d+\.)?(gate|up|down)_proj$")
FUSED = re.compile(r"^(?P<experts>.*\.experts)\.(gate_up_proj|down_proj)$")
KEPT = ("lm_head", "re:.*self_attn.*", "re:.*router.*")


@dataclass
class Job:
    """One row of the table, as the worker sees it."""

    model: Path
    calibration: Path
    out: Path
    settings: dict[str, Any]
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    base_rss: int = field(default_factory=lambda: peak_rss())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the bf16 model, by the names on disk."""
        found: dict[str, Tensor] = {}
        for path in sorted(self.model.glob("*.safetensors")):
            found |= load_file(path)
        return found

    def matrices(self) -> dict[str, Tensor]:
        """The weights [N, K] that are quantised, one an expert and projection."""
        return split(self.tensors())

    def rows(self) -> Tensor:
        """Calibration token ids [rows, tokens]."""
        return torch.from_numpy(np.load(self.calibration))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the wall and CPU time of the block; the peak memory before it is what the imports and the model took."""
        self.base_rss = peak_rss()
        started, cpu = time.monotonic(), time.process_time()
        yield
        self.seconds += time.monotonic() - started
        self.cpu_seconds += time.process_time() - cpu

    def save_codes(self, codes: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
        """Keep FP8 codes (as bytes) and scales, to be compared byte by byte."""
        pairs = {f"{name}.code": code.contiguous() for name, code in codes.items()}
        pairs |= {f"{name}.scale": scale.contiguous() for name, scale in scales.items()}
        save_file(pairs, self.out / "codes.safetensors")

    def finish(
        self, weights: Mapping[str, Tensor], *, bits: float, peer: str, kept: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write weights and figures. `kept` are tensors of the bf16 model that the method changed (folded scales)."""
        tensors = self.tensors()
        for name, tensor in (kept or {}).items():
            assert tensors[name].shape == tensor.shape, name
            tensors[name] = tensor.detach().to(torch.bfloat16).contiguous()
        save_file(merge(tensors, weights), self.out / "model.safetensors", metadata={"format": "pt"})
        figures = {
            "bits": bits,
            "version": version(peer),
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "base_rss": self.base_rss,
            "peak_rss": peak_rss(),
        }
        (self.out / "made.json").write_text(json.dumps(figures, indent=1) + "\n")


def read_job() -> Job:
    """The job on the command line; one thread, so that peers are compared on the same terms."""
    parser = argparse.ArgumentParser()
    for name in ("model", "calibration", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Job(options.model, options.calibration, options.out, options.settings)


def peak_rss() -> int:
    """Bytes of memory this program held at most; `getrusage` counts what its parent held when it was started too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Quantised weights [N, K] out of the layout on disk: fused experts are [E, K, 2N] and [E, K, N] there."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if fused := FUSED.match(name):
            for expert, weight_KN in enumerate(tensor):
                prefix = f"{fused['experts']}.{expert}"
                if name.endswith("gate_up_proj"):
                    gate_KN, up_KN = weight_KN.chunk(2, dim=1)
                    found |= {f"{prefix}.gate_proj": gate_KN.T.contiguous(), f"{prefix}.up_proj": up_KN.T.contiguous()}
                else:
                    found[f"{prefix}.down_proj"] = weight_KN.T.contiguous()
        elif QUANTISED.search(name.removesuffix(".weight")):
            found[name.removesuffix(".weight")] = tensor
    return found


def merge(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layout on disk again, with the given weights in it."""
    left = {name: weight.detach().to(torch.bfloat16) for name, weight in weights.items()}
    merged: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if fused := FUSED.match(name):
            names = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
            experts = [[left.pop(f"{fused['experts']}.{e}.{n}").T for n in names] for e in range(len(tensor))]
            tensor = torch.stack([torch.cat(parts_KN, dim=1) for parts_KN in experts])
        elif name.removesuffix(".weight") in left:
            tensor = left.pop(name.removesuffix(".weight"))
        assert tensor.shape == tensors[name].shape, name
        merged[name] = tensor.contiguous()
    assert not left, f"weights that belong nowhere: {sorted(left)[:3]}"
    return merged


def unfuse(model: nn.Module) -> None:
    """Llama 4's fused experts as one module each, in place, for peers that quantise nn.Linear alone."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.quantizers.base import SequentialLlama4TextExperts

    for name, module in list(model.named_modules()):
        if isinstance(module, Llama4TextExperts):
            experts = SequentialLlama4TextExperts(model.config).to(module.gate_up_proj.dtype)
            fused = {f"{name}.{leaf}": tensor for leaf, tensor in module.state_dict().items()}
            for full, weight_NK in split(fused).items():
                experts.get_submodule(full.removeprefix(f"{name}.")).weight.data.copy_(weight_NK)
            model.set_submodule(name, experts)


def kept_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the bf16 layout that are not quantised, as the model now has them."""
    fused_or_quantised = {n for n in tensors if FUSED.match(n) or QUANTISED.search(n.removesuffix(".weight"))}
    return {n: t for n, t in model.state_dict().items() if n in tensors and n not in fused_or_quantised}
