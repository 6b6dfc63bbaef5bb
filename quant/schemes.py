"""What a scheme stores for a linear layer, how it fills it in, and how config.json describes it.

scheme = Scheme.named("int4", group_size=64)
tensors = scheme.compress(weight_NK)          # {"weight_packed": ..., "weight_scale": ..., "weight_shape": ...}
weight_NK = scheme.decompress(tensors)        # bf16
"""

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import Tensor

from herd.run.errors import ConfigError
from quant import fp8, int4

SCHEMES = ("int4", "fp8")
Header = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Scheme:
    """`int4`: weight-only, symmetric groups. `fp8`: E4M3, per-channel weights, dynamic per-token activations."""

    name: str
    group_size: int | None

    @classmethod
    def named(cls, name: str, group_size: int = 64) -> "Scheme":
        """The scheme of that name; the group size counts for int4 alone."""
        if name not in SCHEMES:
            raise ConfigError(f"scheme = {name!r} is unknown; use one of {', '.join(SCHEMES)}")
        if name == "fp8":
            return cls(name, None)
        if group_size not in int4.GROUP_SIZES:
            allowed = ", ".join(map(str, int4.GROUP_SIZES))
            raise ConfigError(f"group_size = {group_size} is not allowed; use one of {allowed}")
        return cls(name, group_size)

    @property
    def label(self) -> str:
        """For people and for registries: `int4-g64`, `fp8`."""
        return self.name if self.group_size is None else f"{self.name}-g{self.group_size}"

    @property
    def format(self) -> str:
        """Name of the compressed-tensors format."""
        return "pack-quantized" if self.name == "int4" else "float-quantized"

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raise ConfigError when a layer of this [N, K] cannot be stored."""
        if self.group_size is None or shape[1] % self.group_size == 0:
            return
        fitting = [str(size) for size in int4.GROUP_SIZES if shape[1] % size == 0]
        mend = f"use group_size {' or '.join(fitting)}" if fitting else f"keep it with --ignore '{name}' or use fp8"
        fault = f"{shape[1]} input channels do not divide by group_size {self.group_size}"
        raise ConfigError(f"{name}: shape {list(shape)}, {fault}; {mend}")

    def stored(self, shape: tuple[int, int]) -> dict[str, Header]:
        """Suffix, dtype and shape of every tensor a linear layer [N, K] is stored as."""
        rows, columns = shape
        if self.group_size is None:
            return {"weight": (fp8.E4M3, shape), "weight_scale": (torch.bfloat16, (rows, 1))}
        return {
            "weight_packed": (torch.int32, (rows, columns // 8)),
            "weight_scale": (torch.bfloat16, (rows, columns // self.group_size)),
            "weight_shape": (torch.int64, (2,)),
        }

    def compress(self, weight_NK: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a finite weight, by suffix."""
        if self.group_size is None:
            codes_NK, scale_N1 = fp8.quantise(weight_NK)
            return {"weight": codes_NK, "weight_scale": scale_N1}
        codes_NK, scale_NG = int4.quantise(weight_NK, self.group_size)
        shape = torch.tensor(weight_NK.shape, dtype=torch.int64)
        return {"weight_packed": int4.pack(codes_NK), "weight_scale": scale_NG, "weight_shape": shape}

    def decompress(self, tensors: dict[str, Tensor]) -> Tensor:
        """The bf16 weight [N, K] that stored tensors stand for."""
        if self.group_size is None:
            return fp8.dequantise(tensors["weight"], tensors["weight_scale"])
        codes_NK = int4.unpack(tensors["weight_packed"], int(tensors["weight_shape"][1]))
        return int4.dequantise(codes_NK, tensors["weight_scale"])

    def section(self, ignore: list[str]) -> dict:
        """The `quantization_config` of config.json; `ignore` lists every linear layer left alone, by exact name."""
        group = QuantizationScheme(
            targets=["Linear"], weights=self._weights(), input_activations=self._activations(), format=self.format
        )
        config = QuantizationConfig(
            config_groups={"group_0": group}, format=self.format, quantization_status="compressed", ignore=ignore
        )
        return config.model_dump(mode="json", exclude={"moe_sparsity_config"})

    def _weights(self) -> QuantizationArgs:
        if self.group_size is None:
            return QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
        return QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=self.group_size)

    def _activations(self) -> QuantizationArgs | None:
        if self.group_size is not None:
            return None
        return QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="token", dynamic=True)
