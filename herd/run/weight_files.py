"""Safetensors files before anything is loaded from them: is each as long as its header says?

header = read_header(path)      # {"model.norm.weight": {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}, ...}
check_whole(folder)             # every *.safetensors in it
"""

import json
import struct
from pathlib import Path
from typing import Any

from herd.run.errors import DataError


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensors of one file by name. Raises DataError, with the bytes there are and should be, when it is cut short."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        if short := [name for name, facts in header.items() if not {"shape", "data_offsets"} <= facts.keys()]:
            raise ValueError(f"{short[0]} has no shape or no place")
        expected = 8 + length + max((facts["data_offsets"][1] for facts in header.values()), default=0)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); copy or export it again") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise DataError(f"{file}: not a whole safetensors file ({cause}); copy or export it again") from cause
    if expected != size:
        raise DataError(f"{file}: {size} bytes, its header describes {expected}; copy or export it again")
    return header


def check_whole(folder: Path) -> None:
    """Raises DataError for the first file of the folder that is not whole."""
    for file in sorted(folder.glob("*.safetensors")):
        read_header(file)
