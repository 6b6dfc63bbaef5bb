"""GGML blocks of 32 weights, as GGUF files hold them: Q4_0 and Q8_0.

    format = Blocks(Grid(4, True, 32, half=True))
    tensors = format.compress(weight_NK, Ranges())        # {"blocks": uint8 [N, K / 32 * 18]}

N output channels, K input channels, G blocks of a row. A block is an fp16 scale, then the codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats.format import Format, Header, Ranges, undivided
from quant.formats.grid import Grid, Parameters

BLOCK = 32


@dataclass(frozen=True)
class Blocks(Format):
    """A symmetric grid in groups of 32 whose scales are exact in fp16 too (`Grid.half`): nothing is rounded twice."""

    grid: Grid

    @property
    def kind(self) -> str:
        """GGML's name of the type."""
        return {4: "Q4_0", 8: "Q8_0"}[self.grid.bits]

    @property
    def block_bytes(self) -> int:
        return 2 + BLOCK * self.grid.bits // 8

    def fault(self, shape: tuple[int, int]) -> str | None:
        return undivided(shape[1], BLOCK, "blocks of")

    def stored(self, shape: tuple[int, int]) -> dict[str, Header]:
        return {"blocks": (torch.uint8, (shape[0], shape[1] // BLOCK * self.block_bytes))}

    def compress(self, weight_NK: Tensor, ranges: Ranges) -> dict[str, Tensor]:
        parameters = self.grid.search(weight_NK)
        return self.store(self.grid.encode(weight_NK, parameters), parameters)

    def store(self, codes_NK: Tensor, parameters: Parameters) -> dict[str, Tensor]:
        """Codes and parameters (scales as `Grid.storable` gives them) as stored tensors."""
        scale_NG2 = parameters.scale_NG.to(torch.float16).contiguous().view(torch.uint8).unflatten(-1, (-1, 2))
        codes_NGS = codes_NK.unflatten(-1, (-1, BLOCK))
        if self.grid.bits == 4:
            # Byte j holds elements j (low half) and j + 16.
            offset_NGS = (codes_NGS + 8).to(torch.uint8)
            codes_NGS = offset_NGS[..., : BLOCK // 2] | (offset_NGS[..., BLOCK // 2 :] << 4)
        return {"blocks": torch.cat([scale_NG2, codes_NGS.view(torch.uint8)], -1).flatten(-2)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Parameters]:
        """The inverse of `store`."""
        blocks = tensors["blocks"].unflatten(-1, (-1, self.block_bytes))
        scale_NG = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1).float()
        codes = blocks[..., 2:]
        if self.grid.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], -1).to(torch.int8) - 8
        return codes.contiguous().view(torch.int8).flatten(-2), Parameters(scale_NG)

    def decompress(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.grid.decode(*self.unpack(tensors))
