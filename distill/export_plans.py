"""Whether a student can have its exports, before it is trained: each is planned from the shapes of its layers.

check_export_plans("scout", config.students["scout"], model)      # ConfigError naming the student; meta will do
"""

from collections.abc import Mapping

from transformers import PreTrainedModel

from herd.run.errors import ConfigError
from herd.run.schema import Quantize, Student
from quant.options import read_choices
from quant.quantized import plan_method
from quant.schemes import Scheme
from quant.sources import ModelSource


def check_export_plans(name: str, student: Student, model: PreTrainedModel) -> None:
    """Raise ConfigError for groups that do not divide a layer, an allocation of another model, an unknown format."""
    source = ModelSource(model)
    for settings in student.quantize:
        try:
            plan_method(source, chosen_formats(settings), settings.method)
        except ConfigError as error:
            where = "" if settings.allocation is None else f" {settings.allocation}:"
            raise ConfigError(f"students.{name}.quantize:{where} {error}") from None


def chosen_formats(settings: Quantize) -> Scheme | Mapping[str, str]:
    """The scheme, or what the allocation's file says now."""
    if settings.allocation is not None:
        return read_choices(settings.allocation)
    return Scheme.named(settings.scheme, settings.group_size, settings.container)
