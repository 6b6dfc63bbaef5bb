"""What people ask for: a number format by name, its group size, and the container its tensors go into.

scheme = Scheme.named("int4", group_size=64)
tensors = scheme.compress(weight_NK)          # {"weight_packed": ..., "weight_scale": ..., "weight_shape": ...}
weight_NK = scheme.decompress(tensors)        # bf16
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from quant.formats.blocks import Blocks
from quant.formats.format import Format, Header, Ranges
from quant.formats.fp8 import Fp8
from quant.formats.fp8_block import Fp8Block
from quant.formats.fp8_static import Fp8Static
from quant.formats.grid import Grid, Parameters
from quant.formats.int8 import Int8
from quant.formats.mxfp4 import Mxfp4
from quant.formats.nf4 import Nf4
from quant.formats.nvfp4 import Nvfp4
from quant.formats.packed import PackedIntegers
from quant.readers import COMPRESSED, FINE_GRAINED, GGUF, GROUP_SIZES, SCHEMES, check_scheme

# Integer weights in groups: bits, and whether their grid is symmetric.
_GROUPED = {"int4": (4, True), "int4-asym": (4, False), "int8-weights": (8, True)}
_FIXED = {
    "int8": Int8(),
    "fp8": Fp8(),
    "fp8-static": Fp8Static(),
    "mxfp4": Mxfp4(),
    "nvfp4": Nvfp4(),
    "nf4": Nf4(),
    "nf4-double": Nf4(double=True),
}


@dataclass(frozen=True)
class Scheme:
    """A name of `quant.readers.SCHEMES`, its group size where it has groups, and a container it goes into."""

    name: str
    group_size: int | str | None
    """A number, `channel`, or None for formats without a choice."""
    container: str

    @classmethod
    def named(cls, name: str, group_size: int | str = 64, container: str | None = None) -> "Scheme":
        """The scheme of that name; the group size counts where there is a choice, the container is the usual one."""
        usual = SCHEMES[name].containers[0] if name in SCHEMES else COMPRESSED
        check_scheme(name, group_size, container or usual)
        return cls(name, group_size if name in _GROUPED else None, container or usual)

    @property
    def label(self) -> str:
        """For people and for registries: `int4-g64`, `int4-channel`, `fp8`."""
        if self.group_size is None:
            return self.name
        return f"{self.name}-{self.group_size}" if self.group_size == "channel" else f"{self.name}-g{self.group_size}"

    @cached_property
    def format(self) -> Format:
        """The number format, with the names and precisions of its container."""
        if self.name in _GROUPED:
            bits, symmetric = _GROUPED[self.name]
            if self.container == GGUF:
                return Blocks(Grid(bits, symmetric, 32, half=True))
            return PackedIntegers(Grid(bits, symmetric, None if self.group_size == "channel" else self.group_size))
        if self.name == "fp8-block":
            return Fp8Block(inverse=self.container == FINE_GRAINED)
        return _FIXED[self.name]

    @property
    def grid(self) -> Grid | None:
        """The uniform integer grid of the codes; None for formats without one, which only round to nearest."""
        return self.format.grid

    def fitting(self, shapes: Iterable[tuple[int, int]]) -> list[int | str]:
        """The group sizes with which layers of all these [N, K] can be stored; none where there is no choice."""
        if self.container == GGUF or self.group_size is None:
            return []
        others = [Scheme(self.name, size, self.container) for size in GROUP_SIZES]
        return [each.group_size for each in others if all(each.format.fault(shape) is None for shape in set(shapes))]

    def stored(self, shape: tuple[int, int]) -> dict[str, Header]:
        """Suffix, dtype and shape of every tensor a linear layer [N, K] is stored as."""
        return self.format.stored(shape)

    def compress(self, weight_NK: Tensor, ranges: Ranges | None = None) -> dict[str, Tensor]:
        """The stored tensors of a finite weight, by suffix; ranges as far as the format needs them."""
        return self.format.compress(weight_NK, ranges or Ranges())

    def store(self, codes_NK: Tensor, parameters: Parameters) -> dict[str, Tensor]:
        """The stored tensors of codes on the scheme's grid, however they were found."""
        return self.format.store(codes_NK, parameters)

    def decompress(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The bf16 weight [N, K] that stored tensors stand for."""
        return self.format.decompress(tensors)
