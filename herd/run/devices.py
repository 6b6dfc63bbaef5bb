"""Whether a device that was asked for is there.

place = check_device("cuda:1", said="--device cuda:1")
"""

from typing import TYPE_CHECKING

from herd.run.errors import ConfigError, EnvironmentFault, first_line

if TYPE_CHECKING:
    import torch


def check_device(name: str, *, said: str) -> "torch.device":
    """The device; ConfigError for a name torch does not know, EnvironmentFault for one that this machine lacks.

    said: how the user gave it, which the message begins with.
    """
    import torch

    try:
        place = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{said}: no such kind of device; use cpu, cuda or cuda:N") from None
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise EnvironmentFault(f"{said}: not usable on this machine ({first_line(error)}); use cpu") from error
    return place
