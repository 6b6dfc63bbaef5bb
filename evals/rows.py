"""The text a model is scored on, as plain tensors; where it came from is remembered, not interpreted.

    rows = Rows(input_ids_NT, labels_NT, bytes_N, documents_N, source="stdlib")

Legend: N rows, T tokens a row, B rows of a micro-batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from herd.run.errors import DataError

IGNORED = -100


class MicroBatch(NamedTuple):
    rows: slice
    input_ids_BT: Tensor
    labels_BT: Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of token ids. Labels are already shifted (label t is the token after input t); -100 is not scored.

    `bytes_N` counts the UTF-8 bytes of each row's labels; `documents_N` names the document each row starts in.
    """

    input_ids_NT: Tensor
    labels_NT: Tensor
    bytes_N: NDArray[np.int64]
    documents_N: NDArray
    source: str = ""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        count = len(self.input_ids_NT)
        if count == 0:
            raise DataError(f"data {self.source or '(given rows)'}: no held-out row; use more text or shorter rows")
        same_shape = self.input_ids_NT.shape == self.labels_NT.shape
        assert same_shape and len(self.bytes_N) == len(self.documents_N) == count

    def __len__(self) -> int:
        return len(self.input_ids_NT)

    def micro_batches(self, size: int) -> Iterator[MicroBatch]:
        """Successive slices of at most `size` rows, as int64 tensors."""
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield MicroBatch(rows, self.input_ids_NT[rows].long(), self.labels_NT[rows].long())
