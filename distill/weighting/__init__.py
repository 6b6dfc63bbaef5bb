"""The weight between soft and hard targets. `build(config.loss.weighting, steps=...)` makes the configured one."""

from distill.weighting.constant import Constant
from distill.weighting.interface import StepStats, Weighting
from distill.weighting.lead import Lead
from distill.weighting.schedule import Schedule
from herd.run import schema

__all__ = ["StepStats", "Weighting", "build"]


def build(settings: schema.Weighting, *, steps: int) -> Weighting:
    """The weighting these settings describe, for a run of this many student steps."""
    match settings:
        case schema.ConstantAlpha():
            return Constant(settings.alpha)
        case schema.ScheduledAlpha():
            return Schedule(settings, steps=steps)
        case schema.LeadAlpha():
            return Lead(settings, steps=steps)
    raise AssertionError(f"no weighting for {settings!r}")
