"""Who this process is among the ranks of a run, read from the environment a launcher sets; no torch.

rank(), world_size(), local_rank(), local_size(), is_main()
"""

import os

from herd.run.errors import EnvironmentFault


def rank() -> int:
    """Number of this process among all of the run, from 0."""
    return _number("RANK", 0)


def world_size() -> int:
    """Processes of the run."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process among those of its machine, from 0."""
    return _number("LOCAL_RANK", 0)


def local_size() -> int:
    """Processes of the run on this machine (DeepSpeed's and torch's launchers name it differently)."""
    return _number("LOCAL_SIZE", _number("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    """True on the one rank that prints, tracks and writes shared files."""
    return rank() == 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise EnvironmentFault(
            f"{name} = {text}: must be a whole number; launchers set it, unset it to run without one"
        )
    return int(text)
