"""Settings found on a smaller model, as the factors one member of a run trains with.

transferred = carry_over(config, "scout", model)         # None without students.scout.transfer; else weights are scaled
"""

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from herd.llama4.source import is_spec
from herd.llama4.specs import find_spec
from herd.llama4.transfer import Horizon, Rule, betas, scale_weights, scales
from herd.run.errors import ConfigError
from herd.run.schema import Config

TOKENS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")  # the run's tokenizer decides them


@dataclass(frozen=True)
class Transferred:
    rules: dict[str, Rule]
    """By the parameter's name in the model."""
    betas: tuple[float, float]


def carry_over(config: Config, name: str, model: PreTrainedModel) -> Transferred | None:
    """What `transfer` of the model called `name` says, with its freshly drawn weights given their spread.

    Raises ConfigError for a model that is not fresh, or whose small form is of another kind.
    """
    found = transferred_of(config, name, model.config.get_text_config())
    if found is not None:
        scale_weights(model, found.rules)
    return found


def transferred_of(config: Config, name: str, text: PretrainedConfig) -> Transferred | None:
    """The same from the model's configuration alone."""
    settings = config.teacher if name == "teacher" else config.students[name]
    transfer = settings.transfer
    if transfer is None:
        return None
    where = "teacher" if name == "teacher" else f"students.{name}"
    if not is_spec(settings.source):
        raise ConfigError(f"{where}.transfer: {settings.source} is trained already; leave transfer out")
    tokens = {field: getattr(text, field) for field in TOKENS}
    small = find_spec(settings.source).config(**{**tokens, **settings.overrides, **transfer.overrides})
    step = config.batch.rows * config.data.sequence_length
    steps = config.run.steps + (config.teacher.head_start if name == "teacher" else 0)
    horizon = Horizon(
        batch=step / (transfer.batch_tokens or step),
        tokens=steps * step / (transfer.tokens or steps * step),
        exponent=transfer.horizon_exponent,
        averages=transfer.averages,
    )
    rules = scales(small, text, horizon, depth_exponent=transfer.depth_exponent)
    return Transferred(rules, betas(config.optim.betas, horizon))
