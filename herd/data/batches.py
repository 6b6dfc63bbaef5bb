"""What a training step reads: one Batch for every micro-step of a rank, cut from the step's rows.

Suffix legend: B rows of a micro-batch, T tokens a row.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from herd.run.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows for one forward.

    input_ids_BT: int64. labels_BT: int64, already shifted (the token after each input token), -100 where ignored.
    keys_B: int64 names of the rows. bytes_B: int64 bytes of text the labels stand for.
    sources_B: int64 places in `data.sources` of where the rows are from; None without named sources.
    """

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    keys_B: torch.Tensor
    bytes_B: torch.Tensor
    sources_B: torch.Tensor | None = None

    def of_source(self, number: int) -> "Batch":
        """The rows of one source, in this order."""
        own_B = self.sources_B == number
        columns = (self.input_ids_BT, self.labels_BT, self.keys_B, self.bytes_B, self.sources_B)
        return Batch(*(column[own_B] for column in columns))


class RowSource(Protocol):
    """Rows of every step, the same for any number of ranks and any accumulation."""

    def take(self, step: int, *, rows: int, micro_rows: int, rank: int, world: int) -> list[Batch]:
        """The batches of one rank in one step, one for every accumulation micro-step.

        `rows` is the step's total over all ranks. What comes back depends on the arguments alone, not on earlier calls.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position as plain JSON, the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position. Raises DataError when the rows are not those it was saved with."""
        ...


def make_batch(
    rows_BT1: np.ndarray, keys_B: np.ndarray, bytes_B: np.ndarray, sources_B: np.ndarray | None = None
) -> Batch:
    """A batch of rows of T + 1 tokens: inputs are the first T, labels the last T."""
    tokens_BT1 = torch.from_numpy(rows_BT1.astype(np.int64))
    return Batch(
        input_ids_BT=tokens_BT1[:, :-1].contiguous(),
        labels_BT=tokens_BT1[:, 1:].contiguous(),
        keys_B=torch.from_numpy(keys_B.astype(np.int64)),
        bytes_B=torch.from_numpy(bytes_B.astype(np.int64)),
        sources_B=None if sources_B is None else torch.from_numpy(sources_B.astype(np.int64)),
    )


def places_of_rank(rows: int, *, micro_rows: int, rank: int, world: int) -> list[np.ndarray]:
    """Which of a step's rows (0 .. rows-1) a rank takes in each micro-step.

    Micro-step m takes rows m*W*k .. (m+1)*W*k - 1 over all ranks, k of them each in rank order, so one step holds
    the same rows however it is split. Raises ConfigError when they do not split evenly.
    """
    if rows % (micro_rows * world) != 0:
        raise ConfigError(
            f"batch.rows = {rows} is not a multiple of batch.micro_rows x ranks = {micro_rows} x {world}; "
            f"rows = micro_rows x accumulation x ranks must hold"
        )
    return list(np.arange(rows).reshape(-1, world, micro_rows)[:, rank])


def check_same_rows(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise DataError when a position was saved over other rows or another order."""
    if saved.get("rows") != here["rows"]:
        raise DataError(
            "resume: the training rows are not those of the checkpoint (the data's sources, their files, the tokenizer "
            "or data.sequence_length changed); put them back, or start a new run"
        )
    if saved["seed"] != here["seed"]:
        raise DataError(f"resume: run.seed = {here['seed']}, but the checkpoint has {saved['seed']}; put it back")
