"""Methods by name: what each does, whether it needs calibration rows, which schemes it works for. No torch.

check_method("gptq", "int4")                # ConfigError, one line
"""

from collections.abc import Sequence
from dataclasses import dataclass

from herd.run.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """A method for people."""

    summary: str
    calibrated: bool = True
    """It needs calibration rows."""


METHODS: dict[str, Kind] = {
    "rtn": Kind("round to nearest with searched scales", calibrated=False),
    "hqq": Kind("half-quadratic fit of scales and zeros, no data", calibrated=False),
    "gptq": Kind("each column's error is made good by the columns after it"),
    "gptq-gated": Kind("gptq, then gate and up by what their errors do behind the activation"),
    "awq": Kind("channels scaled by how large their inputs are"),
    "signround": Kind("rounding learned by the sign of its gradient"),
}
GRID_SCHEMES = ("int4", "int4-asym", "int8-weights")


def reads_rows(method: str, scheme: str | None) -> bool:
    """Whether quantising needs calibration rows. The schemes of an allocation (None) take none by themselves."""
    return METHODS[method].calibrated or scheme == "fp8-static"


def check_method(method: str, scheme: str) -> None:
    """Raise ConfigError for an unknown method, or one that needs an integer grid where the scheme has none."""
    if method not in METHODS:
        raise ConfigError(f"method = {method!r} is unknown; use one of {', '.join(METHODS)}")
    if method != "rtn" and scheme not in GRID_SCHEMES:
        raise ConfigError(f"method = {method}: works on {', '.join(GRID_SCHEMES)}; use method rtn for {scheme}")


def check_mixed(method: str, schemes: Sequence[str]) -> None:
    """`check_method` for an allocation: the method chooses codes on integer grids, other schemes round to nearest."""
    if len(set(schemes)) == 1:
        check_method(method, schemes[0])
        return
    gridded = [scheme for scheme in schemes if scheme in GRID_SCHEMES]
    check_method(method, gridded[0] if gridded else schemes[0])
    if method == "awq":
        raise ConfigError("method = awq: folds scales across layers of one scheme; use gptq for a mixed allocation")
    if METHODS[method].calibrated and "nvfp4" in schemes:
        raise ConfigError(f"method = {method}: nvfp4 needs ranges over merged layers here; use another choice, or rtn")
