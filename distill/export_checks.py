"""Whether the exports a configuration asks for can be made, before anything is trained. No torch.

check_exports(config)             # ConfigError naming the student
"""

from herd.run.errors import ConfigError
from herd.run.schema import Config, Quantize
from quant.methods.names import check_method
from quant.options import read_choices
from quant.readers import SCHEMES, check_reader, check_scheme


def check_exports(config: Config) -> None:
    """Raise ConfigError for a scheme that its container, or transformers, which reloads it, cannot hold, and for an
    allocation that cannot be read. Whether they fit the model's layers is `distill.export_plans`'s to say."""
    for name, student in config.students.items():
        for settings in student.quantize:
            try:
                _check(settings)
            except ConfigError as error:
                raise ConfigError(f"students.{name}.quantize: {error}") from None


def _check(settings: Quantize) -> None:
    if settings.allocation is not None:
        read_choices(settings.allocation)
        return
    container = settings.container or SCHEMES[settings.scheme].containers[0]
    check_scheme(settings.scheme, settings.group_size, container)
    check_method(settings.method, settings.scheme)
    if container != "gguf":
        check_reader(settings.scheme, container, "transformers", moe=True)
