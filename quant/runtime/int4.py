"""Symmetric int4 in groups, from compressed-tensors' `pack-quantized` words to torch's CPU kernel; 4 bits stay 4 bits.

    layer = Int4.pack([{"weight_packed": ..., "weight_scale": ...}, ...])     # several layers: one above the other
    output_MN = layer.product(input_MK)

M rows, N output channels, K input channels, G groups of a row, S weights in a group, B blocks of R output channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant.runtime.linears import TILE_ELEMENTS, Linear, multiply

KERNEL_GROUPS = (128, 64, 32)  # weights that share a scale in torch's kernel
ROW_MULTIPLE = 16
BLOCKS = (64, 32)  # output channels torch's kernel interleaves on a CPU with AVX-512, with AVX2
CHUNK_ELEMENTS = 1 << 20  # weights widened to int32 at a time while packing


class Int4(Linear):
    """Few rows go through `aten._weight_int4pack_mm_for_cpu`, many through tiles unpacked to bf16."""

    def __init__(self, packed: Tensor, scale_zero_GN2: Tensor, columns: int, block: int | None):
        groups, rows, _ = scale_zero_GN2.shape
        super().__init__(rows, columns)
        self.packed = nn.Buffer(packed, persistent=False)
        self.scale_zero = nn.Buffer(scale_zero_GN2, persistent=False)
        self.group_size = columns // groups
        self.block = block if block and rows % block == 0 else None
        self.kernel_rows = 0
        """Inputs of at most that many rows go through the kernel; `quant.runtime.crossovers` measures it."""

    @classmethod
    def pack(cls, parts: Sequence[dict[str, Tensor]], block: int | None) -> "Int4 | None":
        """The layer of stored parts of one K, exactly; None when torch's kernel cannot hold that shape or grouping.

        parts: `weight_packed` int32 [N, K / 8], eight codes a word, low bits first, stored as code + 8, and
        `weight_scale` [N, G], of any sign. block: of `find_block`.
        """
        words = torch.cat([part["weight_packed"] for part in parts])
        scale_NG = torch.cat([part["weight_scale"] for part in parts]).to(torch.bfloat16)
        rows, columns = words.shape[0], int(parts[0]["weight_shape"][1])
        group = next((size for size in KERNEL_GROUPS if columns % (scale_NG.shape[1] * size) == 0), None)
        if group is None or rows % ROW_MULTIPLE:
            return None
        # Longer groups, whole channels too, become several of the kernel's with the same scale.
        scale_NG = scale_NG.repeat_interleave(columns // (scale_NG.shape[1] * group), 1)
        scale_zero_GN2 = torch.zeros(columns // group, rows, 2, dtype=torch.bfloat16)
        scale_zero_GN2[..., 0] = scale_NG.t()
        return cls(pack_words(words, columns), scale_zero_GN2, columns, block)

    def product(self, input_MK: Tensor) -> Tensor:
        if len(input_MK) <= self.kernel_rows or self.block is None:
            return self.through_kernel(input_MK)
        return self.through_tiles(input_MK)

    def through_kernel(self, input_MK: Tensor) -> Tensor:
        """[M, N]: products of bf16 inputs with code x scale, which the kernel does not round, summed in fp32."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            input_MK.contiguous(), self.packed, self.group_size, self.scale_zero
        )

    def through_tiles(self, input_MK: Tensor) -> Tensor:
        """[M, N]: code x scale rounded once to bf16, as readers of the format do, some output channels at a time."""
        half = self.block // 2
        output_MB2H = input_MK.new_empty(len(input_MK), self.out_features // self.block, 2, half)
        step = max(1, TILE_ELEMENTS // (self.block * self.in_features))
        for start in range(0, output_MB2H.shape[1], step):
            blocks = slice(start, start + step)
            for which, weight_KN in enumerate(self.unpack(blocks)):
                output_MB2H[:, blocks, which] = multiply(input_MK, weight_KN.t()).unflatten(1, (-1, half))
        return output_MB2H.view(len(input_MK), self.out_features)

    def unpack(self, blocks: slice) -> tuple[Tensor, Tensor]:
        """bf16 weights [K, N] of the first and of the second half of the output channels of each block."""
        packed_BKH = self.packed.view(-1, self.in_features, self.block // 2)[blocks]
        packed_KN = packed_BKH.transpose(0, 1).reshape(self.in_features, -1)
        scale_GB2H = self.scale_zero[..., 0].view(len(self.scale_zero), -1, 2, self.block // 2)[:, blocks]
        return self._values(packed_KN & 15, scale_GB2H[:, :, 0]), self._values(packed_KN >> 4, scale_GB2H[:, :, 1])

    def _values(self, codes_KN: Tensor, scale_GBH: Tensor) -> Tensor:
        codes_GSN = codes_KN.to(torch.bfloat16).sub_(8).unflatten(0, (-1, self.group_size))
        return codes_GSN.mul_(scale_GBH.reshape(len(scale_GBH), 1, -1)).flatten(0, 1)


def pack_words(words_NW: Tensor, columns: int) -> Tensor:
    """The kernel's bytes uint8 [N, K / 2] of stored words int32 [N, K / 8]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    packed = torch.empty(len(words_NW), columns // 2, dtype=torch.uint8)
    # Blocks of output channels are packed by themselves, so whole blocks can be packed apart.
    step = max(1, CHUNK_ELEMENTS // (columns * BLOCKS[0])) * BLOCKS[0]
    for start in range(0, len(words_NW), step):
        rows = slice(start, start + step)
        codes_NK = (words_NW[rows, :, None] >> shifts).bitwise_and_(15).flatten(1)[:, :columns]
        packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK.contiguous(), 1)
    return packed


def find_block() -> int | None:
    """How many output channels torch interleaves here, found by unpacking a small matrix; None: some other layout."""
    codes_NK = torch.randint(0, 16, (128, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK, 1)
    for block in BLOCKS:
        packed_BKH = packed.view(-1, 32, block // 2)
        codes_BKR = torch.cat([packed_BKH & 15, packed_BKH >> 4], 2)
        if torch.equal(codes_BKR.transpose(1, 2).reshape(128, 32), codes_NK.to(torch.uint8)):
            return block
    return None
