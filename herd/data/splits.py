"""Which part a document belongs to, decided by a hash of its text and nothing else.

Equal texts land in the same part wherever they come from, and order, names and other documents do not matter.
"""

import hashlib
from typing import Literal

import numpy as np

from herd.run.errors import DataError
from herd.run.schema import Data

Part = Literal["train", "heldout", "calibration"]
PARTS: tuple[Part, ...] = ("train", "heldout", "calibration")
LEFT_OUT = 255


def text_digest(text: str) -> bytes:
    """The first 16 bytes of the SHA-256 of the text in UTF-8 (lone surrogates, which UTF-8 lacks, included)."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def part_of(digest: bytes, data: Data) -> Part:
    """The part of a text by itself: the lowest share of hashes is held out, the next is for calibration."""
    place = int.from_bytes(digest[:8], "big") / 2.0**64
    if place < data.heldout_fraction:
        return "heldout"
    if place < data.heldout_fraction + data.calibration_fraction:
        return "calibration"
    return "train"


def split_all(digests_N: np.ndarray, data: Data, name: str) -> np.ndarray:
    """Parts (indices into PARTS, uint8) of distinct texts with these 16-byte digests ([N, 16] uint8).

    The same as `part_of`, except that a small corpus gives its lowest hashes to parts that would be empty.
    Raises DataError for fewer than three texts.
    """
    count = len(digests_N)
    if count < len(PARTS):
        raise DataError(
            f"data.source = {name} holds {count} distinct non-empty document(s); at least {len(PARTS)} are needed for "
            "the train, held-out and calibration parts: give more documents, or one longer text file"
        )
    place_N = digests_N[:, :8].copy().view(">u8")[:, 0] / 2.0**64
    heldout = min(max(1, int((place_N < data.heldout_fraction).sum())), count - 2)
    reserved = int((place_N < data.heldout_fraction + data.calibration_fraction).sum())
    reserved = min(max(heldout + 1, reserved), count - 1)
    order_N = np.argsort(place_N, kind="stable")
    parts_N = np.full(count, PARTS.index("train"), dtype=np.uint8)
    parts_N[order_N[:reserved]] = PARTS.index("calibration")
    parts_N[order_N[:heldout]] = PARTS.index("heldout")
    return parts_N
