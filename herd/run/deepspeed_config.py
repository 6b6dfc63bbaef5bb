"""The DeepSpeed configuration of one engine, generated from ours: nothing is set in two places.

settings = build(config, model_name="scout", lr=2e-3, micro_rows=4, accumulation=1, world_size=2, expert_parallel=1)
"""

import copy
import difflib
import sys
from collections.abc import Iterator
from typing import Any

from herd.run import config_text
from herd.run.errors import ConfigError
from herd.run.schema import Config

AUTOEP_PRESET = "llama4"  # registered by herd.llama4
# Keys of DeepSpeed that this workbench decides -> the field that decides them.
DECIDED = {
    ("train_batch_size",): "batch.rows",
    ("train_micro_batch_size_per_gpu",): "batch.micro_rows",
    ("gradient_accumulation_steps",): "batch.rows and batch.micro_rows",
    ("gradient_clipping",): "optim.clip",
    ("bf16", "enabled"): "run.precision",
    ("bfloat16",): "run.precision",
    ("fp16",): "run.precision",
    ("torch_autocast",): "run.precision",
    ("optimizer",): "optim",
    ("scheduler",): "optim.schedule",
    ("zero_optimization", "stage"): "parallel.zero",
    ("expert_parallel", "enabled"): "parallel.expert_parallel",
    ("expert_parallel", "autoep_size"): "parallel.expert_parallel",
    ("expert_parallel", "preset_model"): "parallel.expert_parallel",
}
# What may be passed through. DeepSpeed ignores an unknown key in silence, so the list is closed; what is missing
# (its data loader, monitors, pipeline, autotuner) would have no effect in this trainer, or an effect twice.
OPEN = (
    "activation_checkpointing",
    "aio",
    "bf16",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "compile",
    "data_types",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "expert_parallel",
    "flops_profiler",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "timers",
    "use_data_before_expert_parallelism",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)


def build(
    config: Config,
    *,
    model_name: str,
    lr: float,
    micro_rows: int,
    accumulation: int,
    world_size: int,
    expert_parallel: int,
    betas: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Settings for `deepspeed.initialize` of the model called `model_name`; `lr` is where its optimiser starts.

    There is no scheduler: the loop sets the rate of every step. Raises ConfigError for keys in `deepspeed.extra` that
    our tree decides or that DeepSpeed would ignore.
    """
    optim, extra = config.optim, dict(config.deepspeed.extra)
    found = list(conflicts(extra))
    if found:
        raise ConfigError(f"{model_name}: {'; '.join(found)}")
    if expert_parallel == 1:
        extra.pop("expert_parallel", None)  # meant for the models that have experts to spread
    settings: dict[str, Any] = {
        "train_batch_size": micro_rows * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip,
        "zero_optimization": {"stage": config.parallel.zero},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": lr,
                "betas": list(betas or optim.betas),
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
                "torch_adam": True,  # DeepSpeed's own Adam would be compiled first
                "fused": True,  # one pass over the states; torch's CPU and CUDA builds both have it
            },
        },
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
    }
    if config.run.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if expert_parallel > 1:
        settings["expert_parallel"] = autoep_section(expert_parallel)
    return _merged(settings, extra)


def autoep_section(expert_parallel: int) -> dict[str, Any]:
    """The `expert_parallel` section that spreads a layer's experts over this many ranks."""
    return {"enabled": True, "autoep_size": expert_parallel, "preset_model": AUTOEP_PRESET}


def conflicts(extra: dict[str, Any]) -> Iterator[str]:
    """One line for each key of `deepspeed.extra` that cannot be passed through."""
    decided = {path[0]: field for path, field in DECIDED.items() if len(path) == 1}
    for key, value in extra.items():
        if key in decided:
            yield f"deepspeed.extra.{key}: decided by {decided[key]}; set that"
        elif key not in OPEN:
            near = difflib.get_close_matches(key, OPEN, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(OPEN)}"
            yield f"deepspeed.extra.{key}: not passed to DeepSpeed; {hint}"
        elif (key, "enabled") in DECIDED or (key, "stage") in DECIDED:
            yield from _nested_conflicts(key, value)


def _nested_conflicts(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"deepspeed.extra.{key} = {config_text.write_inline(value)}: must be a mapping"
        return
    for inner in value:
        if (key, inner) in DECIDED:
            yield f"deepspeed.extra.{key}.{inner}: decided by {DECIDED[key, inner]}; set that"


def _merged(settings: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Both trees in one; where both have a value that is no mapping, the extra one wins."""
    out = copy.deepcopy(settings)
    for key, value in extra.items():
        both = isinstance(out.get(key), dict) and isinstance(value, dict)
        out[key] = _merged(out[key], value) if both else copy.deepcopy(value)
    return out
