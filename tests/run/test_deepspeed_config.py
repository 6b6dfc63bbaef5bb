"""The generated DeepSpeed configuration: what it says, what it refuses, and that DeepSpeed reads every key of it."""

import pytest

from herd.run import config_text, deepspeed_config
from herd.run.errors import ConfigError
from herd.run.schema import Config


def configured(**sections: dict) -> Config:
    tree = {"run": {"name": "try", "steps": 10}, "students": {"scout": {"source": "scout-nano"}}}
    return Config.model_validate(tree | sections)


def built(config: Config, **changes: int) -> dict:
    facts = {"micro_rows": 2, "accumulation": 3, "world_size": 4, "expert_parallel": 1} | changes
    return deepspeed_config.build(config, model_name="scout", lr=5e-4, **facts)


class Spy(dict):
    """A mapping that remembers which keys were asked for."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def get(self, key: str, default: object = None) -> object:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> object:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> "Spy":
        return self

    def __copy__(self) -> "Spy":
        return self


def test_every_key_we_write_or_pass_through_is_one_deepspeed_reads() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    spy = Spy(built(configured(run={"name": "try", "steps": 1, "precision": "fp32"}), world_size=1))
    DeepSpeedConfig(spy)
    ours = {*deepspeed_config.OPEN, *(path[0] for path in deepspeed_config.DECIDED), *spy}
    assert ours <= spy.asked


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_deepspeed_parses_what_was_meant(zero: int, precision: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = configured(
        run={"name": "try", "steps": 10, "precision": precision},
        parallel={"zero": zero, "expert_parallel": 2},
        optim={"clip": 0.5, "betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.3},
    )
    parsed = DeepSpeedConfig(built(config, world_size=1, expert_parallel=2))
    assert (parsed.train_batch_size, parsed.train_micro_batch_size_per_gpu, parsed.gradient_accumulation_steps) == (
        6,
        2,
        3,
    )
    assert parsed.zero_optimization_stage == zero
    assert parsed.bfloat16_config.enabled is (precision == "bf16")
    assert not parsed.float16_config.enabled
    assert parsed.gradient_clipping == 0.5
    assert parsed.scheduler_name is None
    expected = {"lr": 5e-4, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0.3, "torch_adam": True, "fused": True}
    assert (parsed.optimizer_name, parsed.optimizer_params) == ("adamw", expected)
    experts = parsed.expert_parallel_config
    assert (experts.enabled, experts.autoep_size, experts.preset_model) == (True, 2, "llama4")


def test_expert_parallelism_appears_only_where_experts_are_spread() -> None:
    config = configured(deepspeed={"extra": {"expert_parallel": {"use_grouped_mm": False}}})
    assert "expert_parallel" not in built(config)
    assert built(config, expert_parallel=2)["expert_parallel"]["use_grouped_mm"] is False


def test_extra_keys_are_merged_into_the_sections_we_make_and_leave_the_configuration_alone() -> None:
    extra = {
        "zero_optimization": {"overlap_comm": True},
        "wall_clock_breakdown": True,
        "bf16": {"check_grad_overflow": False},
    }
    config = configured(deepspeed={"extra": extra}, parallel={"zero": 2})
    settings = built(config)
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert settings["wall_clock_breakdown"] is True
    settings["zero_optimization"]["stage"] = 3
    assert config.deepspeed.extra == extra


@pytest.mark.parametrize(
    ("path", "field"), [(".".join(path), field) for path, field in deepspeed_config.DECIDED.items()]
)
def test_a_key_that_our_tree_decides_is_refused_naming_our_field(path: str, field: str) -> None:
    extra: object = 1
    for part in reversed(path.split(".")):
        extra = {part: extra}
    assert list(deepspeed_config.conflicts(extra)) == [f"deepspeed.extra.{path}: decided by {field}; set that"]
    with pytest.raises(ConfigError, match=r"^scout: deepspeed\.extra"):
        built(configured(deepspeed={"extra": extra}))


def test_a_key_deepspeed_would_ignore_is_refused_with_the_nearest() -> None:
    (line,) = deepspeed_config.conflicts({"zero_optimisation": {}})
    assert line == "deepspeed.extra.zero_optimisation: not passed to DeepSpeed; did you mean zero_optimization?"
    (line,) = deepspeed_config.conflicts({"tensorboard": {}})
    assert line.startswith("deepspeed.extra.tensorboard: not passed to DeepSpeed; allowed: activation_checkpointing, ")
    (line,) = deepspeed_config.conflicts({"zero_optimization": 2})
    assert line == "deepspeed.extra.zero_optimization = 2: must be a mapping"


def test_the_settings_are_plain_values() -> None:
    settings = built(configured(parallel={"expert_parallel": 2}), expert_parallel=2)
    assert config_text.parse(config_text.write(settings)) == settings
