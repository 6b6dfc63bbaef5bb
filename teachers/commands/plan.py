"""What a cache will cost, before anything is started: bytes, teacher hours, and when it pays.

    plan(options).to_text()

The teacher's time is its forward FLOPs over the device's, or tokens over a measured speed; nothing runs on a device.
"""

from dataclasses import asdict, dataclass
from math import floor
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Llama4TextConfig, PreTrainedConfig

from herd.llama4.counts import forward_flops
from herd.llama4.plan import H100_BF16_FLOPS
from herd.llama4.source import is_spec, read_config
from herd.run import hub
from teachers.commands.job import prepare
from teachers.commands.options import Options
from teachers.commands.sample import sample_bytes
from teachers.commands.ways import EACH, MEANING, TOGETHER, work


@dataclass(frozen=True)
class Plan:
    """All that is asked before a start. Hours are of the clock, with all ranks at work."""

    settings: dict[str, Any]
    """What was chosen or taken from the model, the cache or the defaults."""
    vocabulary: int
    tokens: int
    bytes_per_token: float
    bytes: int
    dense_bytes: int
    """The same tokens as whole bf16 distributions."""
    flops_per_token: float
    tokens_per_second: float
    """Of the teacher's forward, all ranks together."""
    speed_from: str
    students: int
    epochs: int
    hours: dict[str, float]
    """Teacher hours of forwards that only make targets, by way of distilling."""
    pays_from: dict[str, int]
    """Number of students from which the offline cache costs less teacher time than each online way."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        """Aligned lines."""
        readers = f"{self.students} student{'s' if self.students > 1 else ''}, {self.epochs} epoch"
        readers += "s" if self.epochs > 1 else ""
        lines = [
            *((name.replace("_", " "), str(value)) for name, value in self.settings.items()),
            ("tokens", f"{self.tokens:,} of a vocabulary of {self.vocabulary:,}"),
            ("bytes a token", f"{self.bytes_per_token:.1f}, container included (estimate)"),
            ("disk", f"{self.bytes / 1e9:,.3f} GB; dense bf16 would take {self.dense_bytes / 1e9:,.1f} GB"),
            ("teacher", f"{self.flops_per_token:.4g} FLOPs a token, {self.tokens_per_second:,.0f} tokens/s"),
            ("", self.speed_from),
            ("teacher hours", f"of forwards that only make targets, for {readers}"),
            *((f"  {way}", f"{hours:>10,.2f}  {MEANING[way]}") for way, hours in self.hours.items()),
            ("offline pays", "in teacher time"),
            *((f"  over {way}", _from(count)) for way, count in self.pays_from.items()),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def plan(options: Options) -> Plan:
    """The plan of these options. Counts the data's tokens unless they are given; loads no weights."""
    config = _config(options)
    tokens = options.tokens or _count_tokens(options)
    per_token = sample_bytes(options.codec, config.vocab_size, options.data.sequence_length)
    flops = _forward_flops(config, options.data.sequence_length)
    if options.tokens_per_second is None:
        speed = options.world_size * H100_BF16_FLOPS * options.mfu / flops
        source = f"{options.mfu:.0%} of the bf16 peak of {options.world_size} H100; --tokens-per-second takes yours"
    else:
        speed, source = options.tokens_per_second, "measured, as given"
    once = tokens / speed / 3600
    chosen = ("model", "out", "part", "codec", "temperature", "seed")
    data = {"data": options.data.source, "sequence_length": options.data.sequence_length}
    return Plan(
        settings={name: str(getattr(options, name)) for name in chosen} | data,
        vocabulary=config.vocab_size,
        tokens=tokens,
        bytes_per_token=per_token,
        bytes=round(per_token * tokens),
        dense_bytes=2 * config.vocab_size * tokens,
        flops_per_token=flops,
        tokens_per_second=speed,
        speed_from=source,
        students=options.students,
        epochs=options.epochs,
        hours={
            way: once * done.forwards for way, done in work(students=options.students, epochs=options.epochs).items()
        },
        pays_from={TOGETHER: 1 if options.epochs > 1 else 0, EACH: floor(1 / options.epochs) + 1},
    )


def _config(options: Options) -> PreTrainedConfig:
    if is_spec(options.model):
        return read_config(options.model)
    return read_config(str(hub.local_folder(options.model, "--model")))


def _forward_flops(config: PreTrainedConfig, length: int) -> float:
    """Of one token's forward: exact for Llama 4, twice the weights met by products for other models."""
    if isinstance(config, Llama4TextConfig):
        return forward_flops(config, length)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    table = 0 if tied else model.get_input_embeddings().weight.numel()
    return 2.0 * (sum(parameter.numel() for parameter in model.parameters()) - table)


def _count_tokens(options: Options) -> int:
    """Tokens of the rows there will be; packs them, which the cache needs anyway."""
    return len(prepare(options).indices_N) * options.data.sequence_length


def _from(count: int) -> str:
    return f"from {count} student{'s' if count > 1 else ''} on" if count else "never: both are one forward a row"
