"""Weight-only integers of 4 or 8 bits in compressed-tensors' `pack-quantized` words.

    format = PackedIntegers(Grid(4, True, 64))
    format.store(codes_NK, parameters)          # {"weight_packed", "weight_scale", "weight_shape", ...}

N output channels, K input channels, G groups of a row, W words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from torch import Tensor

from quant.formats.format import Format, Header, Ranges, undivided
from quant.formats.grid import Grid, Parameters


@dataclass(frozen=True)
class PackedIntegers(Format):
    grid: Grid

    def fault(self, shape: tuple[int, int]) -> str | None:
        if self.grid.group_size is not None and (fault := undivided(shape[1], self.grid.group_size, "group_size")):
            return fault
        return undivided(shape[1], 32 // self.grid.bits, "words of")

    def stored(self, shape: tuple[int, int]) -> dict[str, Header]:
        rows, columns = shape
        groups = self.grid.groups(columns)
        headers: dict[str, Header] = {
            "weight_packed": (torch.int32, (rows, columns * self.grid.bits // 32)),
            "weight_scale": (torch.bfloat16, (rows, groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        if not self.grid.symmetric:
            headers["weight_zero_point"] = (torch.int32, (ceil(rows * self.grid.bits / 32), groups))
        return headers

    def compress(self, weight_NK: Tensor, ranges: Ranges) -> dict[str, Tensor]:
        parameters = self.grid.search(weight_NK)
        return self.store(self.grid.encode(weight_NK, parameters), parameters)

    def store(self, codes_NK: Tensor, parameters: Parameters) -> dict[str, Tensor]:
        """Codes and parameters, however they were found, as stored tensors.

        Element i of a row lies in bits [i b, (i + 1) b) of the row's words, lowest first, offset by 2^(b - 1); zeros
        are packed likewise along the rows.
        """
        tensors = {
            "weight_packed": pack_to_int32(codes_NK, self.grid.bits),
            "weight_scale": parameters.scale_NG.to(torch.bfloat16),
            "weight_shape": torch.tensor(codes_NK.shape, dtype=torch.int64),
        }
        if parameters.zero_NG is not None:
            tensors["weight_zero_point"] = pack_to_int32(parameters.zero_NG, self.grid.bits, packed_dim=0)
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Parameters]:
        """The inverse of `store`."""
        rows, columns = tensors["weight_shape"].tolist()
        codes_NK = unpack_from_int32(tensors["weight_packed"], self.grid.bits, torch.Size((rows, columns)))
        scale_NG = tensors["weight_scale"].float()
        if self.grid.symmetric:
            return codes_NK, Parameters(scale_NG)
        # Transposed here: the library cannot unpack a single word of zeros along the rows.
        words_GW = tensors["weight_zero_point"].T.clone(memory_format=torch.contiguous_format)
        return codes_NK, Parameters(scale_NG, unpack_from_int32(words_GW, self.grid.bits, scale_NG.T.shape).T)

    def decompress(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.grid.decode(*self.unpack(tensors))
