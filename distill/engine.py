"""One model under one DeepSpeed engine: build it, step it, save and load its state, write it as an HF folder.

    member = build_member("scout", model, config, lr=2e-3, ...)
    member.save(folder); member.load(folder); member.export(folder, tokenizer=tokenizer)

Several members live in one process and share its ranks.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.utils.tensor_fragment import fragment_address
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from distill.features import FeatureLosses
from distill.learner import Learner, parameter_groups
from distill.shells import filled, shell_of
from distill.transferred import Transferred
from herd.llama4 import expert_parallel
from herd.llama4.balance import RouterTap
from herd.llama4.model import restore_rope
from herd.run import deepspeed_config, files, ranks
from herd.run.schema import Config, OnPolicy
from teachers.recorder import Recorder

MAX_SHARD_SIZE = "5GB"


class SafeCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's checkpoint files, read without running any code they might carry."""

    def save(self, state_dict: dict, path: str) -> None:
        # Python before 3.11.4 pickles an enum as a call of getattr, which no safe reader may allow.
        super().save(without_enums(state_dict), path)

    def load(self, path: str, map_location: str | None = None) -> dict:
        with torch.serialization.safe_globals([LossScaler, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)


def without_enums(value: Any) -> Any:
    """The same nest of dicts, lists and tuples with every enum replaced by its plain value."""
    if isinstance(value, Enum):
        return value.value
    if type(value) in (dict, OrderedDict):
        return type(value)((key, without_enums(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(without_enums(item) for item in value)
    return value


@dataclass
class Member:
    """A model that trains: teacher or student."""

    name: str
    learner: Learner
    engine: deepspeed.DeepSpeedEngine
    tap: RouterTap
    peak_lr: float
    shell: PreTrainedModel | None = None
    """Where `whole` puts weights that ZeRO-3 keeps in parts."""

    @property
    def top_k(self) -> int:
        """Experts a token meets; 1 for a model without experts."""
        return self.learner.config.get_text_config().to_dict().get("num_experts_per_tok") or 1

    @property
    def feature_names(self) -> list[str]:
        """Of its feature losses, in their order."""
        return self.learner.features.names if self.learner.features else []

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]

    def gathered_head(self) -> deepspeed.zero.GatheredParameters:
        """Context in which the head's matrix is whole on every rank (ZeRO-3 keeps it in parts)."""
        stage = self.engine.zero_optimization_stage()
        return deepspeed.zero.GatheredParameters([self.learner.head.weight], enabled=stage == 3)

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The model, to run any number of forwards on without gradient; under ZeRO-3 a copy with whole weights."""
        if self.shell is None:
            yield self.learner.model
        else:
            yield filled(self.shell, self.learner.model)

    def save(self, folder: Path) -> None:
        """Write weights and optimiser state of every rank under folder/<name>."""
        self.engine.save_checkpoint(str(folder / self.name), tag="state", save_latest=False)

    def load(self, folder: Path) -> None:
        """Restore exactly what `save` wrote."""
        self.engine.load_checkpoint(str(folder / self.name), tag="state")

    def export(self, folder: Path, *, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a plain HF folder, atomically; a collective call, rank 0 writes."""
        state = expert_parallel.full_state_dict(self.engine)
        if ranks.is_main():
            # What the learner has besides the model (projections of feature losses) serves training only.
            inside = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
            state = {name.removeprefix("model."): tensor for name, tensor in inside.items()}
            write_model_folder(folder, self.learner.config, state, tokenizer)
        ranks.barrier()


def build_member(
    name: str,
    model: PreTrainedModel,
    config: Config,
    *,
    lr: float,
    micro_rows: int,
    accumulation: int,
    run_folder: Path,
    features: FeatureLosses | None = None,
    transfer: Transferred | None = None,
) -> Member:
    """Wrap `model` in an engine as the config says; the generated ds_config is saved beside the run.

    `features` train with it, in the same engine. `transfer`: what settings of a smaller model become in this one.
    """
    settings = deepspeed_config.build(
        config,
        model_name=name,
        lr=lr,
        micro_rows=micro_rows,
        accumulation=accumulation,
        world_size=ranks.world_size(),
        expert_parallel=config.parallel.expert_parallel,
        betas=transfer.betas if transfer else config.optim.betas,
    )
    if ranks.is_main():
        files.write_atomic(run_folder / f"ds_config.{name}.json", json.dumps(settings, indent=2) + "\n")
    expert_parallel.install_preset()
    writes = isinstance(config.objective, OnPolicy) and name != "teacher"
    shell = shell_of(model) if writes and config.parallel.zero == 3 else None
    learner = Learner(model, features)
    engine, *_ = deepspeed.initialize(
        model=learner,
        model_parameters=parameter_groups(
            learner,
            weight_decay=config.optim.weight_decay,
            eps=config.optim.eps,
            rules=transfer.rules if transfer else None,
        ),
        config=settings,
    )
    engine.checkpoint_engine = SafeCheckpointEngine(engine._config)
    restore_rope(learner)
    if features is not None:
        learner.recorder = Recorder(model, features.places(0))
    return Member(name, learner, engine, RouterTap(learner), lr, shell)


def write_model_folder(
    folder: Path, config: object, state: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """config.json, safetensors shards, tokenizer files: to a temporary folder first, then renamed into place.

    Raises DiskFull before anything is written when the weights do not fit.
    """
    files.require_space(folder, sum(tensor.nbytes for tensor in state.values()), what=f"the model {folder.name}")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config().to_dict()
    if "attn_temperature_tuning" in text:  # vLLM looks for it here, not in config.json
        skeleton.generation_config.attn_temperature_tuning = bool(text["attn_temperature_tuning"])
    temporary = folder.with_name(f".{folder.name}.tmp")
    skeleton.save_pretrained(temporary, state_dict=state, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(temporary)
    files.replace_folder(temporary, folder)
