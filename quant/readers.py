"""Which number format goes into which container, and who reads it there. Rules as data; no torch.

    check_scheme("nf4", 64, "gguf")                   # ConfigError, one line
    check_reader("int4-asym", COMPRESSED, "vllm", moe=True)

What is said of vLLM and llama.cpp follows their source (vLLM of summer 2026); `docs/quantisation.md` says what was run.
"""

from dataclasses import dataclass

from herd.run.errors import ConfigError

COMPRESSED, BITSANDBYTES, FINE_GRAINED, GGUF = "compressed-tensors", "bitsandbytes", "fine-grained-fp8", "gguf"
CONTAINERS = (COMPRESSED, BITSANDBYTES, FINE_GRAINED, GGUF)
READERS = ("transformers", "vllm", "llama.cpp")
GROUP_SIZES = (32, 64, 128, "channel")


@dataclass(frozen=True)
class Kind:
    """A number format for people."""

    summary: str
    containers: tuple[str, ...]
    """Those it goes into, the usual one first."""
    grouped: bool = False
    """There is a choice of group size."""


SCHEMES: dict[str, Kind] = {
    "int4": Kind("4-bit integers in groups, symmetric", (COMPRESSED, GGUF), grouped=True),
    "int4-asym": Kind("4-bit integers in groups, with a zero for each", (COMPRESSED,), grouped=True),
    "int8": Kind("8-bit integers a channel, activations 8-bit integers a token", (COMPRESSED,)),
    "int8-weights": Kind("8-bit integers in groups, activations bf16", (COMPRESSED, GGUF), grouped=True),
    "fp8": Kind("E4M3 a channel, activations E4M3 a token", (COMPRESSED,)),
    "fp8-static": Kind("E4M3 a tensor, activations E4M3 with a calibrated scale", (COMPRESSED,)),
    "fp8-block": Kind("E4M3 in blocks of 128 x 128, activations in groups of 128", (COMPRESSED, FINE_GRAINED)),
    "mxfp4": Kind("4-bit floats, a power of two for each 32", (COMPRESSED,)),
    "nvfp4": Kind("4-bit floats, an E4M3 scale for each 16", (COMPRESSED,)),
    "nf4": Kind("4-bit normal quantiles in blocks of 64", (BITSANDBYTES,)),
    "nf4-double": Kind("4-bit normal quantiles, scales in 8 bits", (BITSANDBYTES,)),
}


@dataclass(frozen=True)
class Limit:
    """A model that a reader cannot take: `moe` counts for models with experts only."""

    scheme: str
    container: str
    reader: str
    reason: str
    moe: bool = False


LIMITS = (
    Limit("int4-asym", COMPRESSED, "vllm", "its expert kernels take symmetric integers only", moe=True),
    Limit("nf4", BITSANDBYTES, "vllm", "it has no 4-bit bitsandbytes path for Llama 4's experts", moe=True),
    Limit("nf4-double", BITSANDBYTES, "vllm", "it has no 4-bit bitsandbytes path for Llama 4's experts", moe=True),
    Limit(
        "fp8-block",
        FINE_GRAINED,
        "transformers",
        "it keeps Llama 4's experts fused there and has no scales for them",
        moe=True,
    ),
)


def check_scheme(scheme: str, group_size: int | str, container: str) -> None:
    """Raise ConfigError for a scheme that is unknown or cannot be stored in a container with that group size."""
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme = {scheme!r} is unknown; use one of {', '.join(SCHEMES)}")
    if container not in CONTAINERS:
        raise ConfigError(f"container = {container!r} is unknown; use one of {', '.join(CONTAINERS)}")
    allowed = SCHEMES[scheme].containers
    if container not in allowed:
        holding = ", ".join(name for name, kind in SCHEMES.items() if container in kind.containers)
        mend = f"it goes into {' or '.join(allowed)} ({container} takes {holding})"
        raise ConfigError(f"{scheme} cannot be stored as {container}; {mend}")
    if not SCHEMES[scheme].grouped:
        return
    if group_size not in GROUP_SIZES:
        raise ConfigError(f"group_size = {group_size} is not allowed; use one of {', '.join(map(str, GROUP_SIZES))}")
    if container == GGUF and group_size != 32:
        raise ConfigError(f"group_size = {group_size}: GGUF's blocks hold 32 weights; use group_size 32")


def readers(scheme: str, container: str, *, moe: bool) -> list[str]:
    """Programs that read the result."""
    if container == GGUF:
        return ["llama.cpp"]
    return [name for name in ("transformers", "vllm") if limit(scheme, container, name, moe=moe) is None]


def limit(scheme: str, container: str, reader: str, *, moe: bool) -> str | None:
    """Why a reader cannot take a model; None when it can."""
    if (reader == "llama.cpp") != (container == GGUF):
        return f"it does not read {container}"
    found = [rule for rule in LIMITS if (rule.scheme, rule.container, rule.reader) == (scheme, container, reader)]
    return next((rule.reason for rule in found if moe or not rule.moe), None)


def check_reader(scheme: str, container: str, reader: str, *, moe: bool) -> None:
    """Raise ConfigError when the named reader cannot take the result."""
    reason = limit(scheme, container, reader, moe=moe)
    if reason is not None:
        readable = {
            (name, place): None
            for name, kind in SCHEMES.items()
            for place in kind.containers
            if limit(name, place, reader, moe=moe) is None
        }
        places = [place for name, place in readable if name == scheme]
        others = dict.fromkeys(name for name, _ in readable)
        mend = f"use container {places[0]}" if places else f"it reads {', '.join(others)}"
        raise ConfigError(f"{scheme} as {container} is not for {reader}: {reason}; {mend}")
