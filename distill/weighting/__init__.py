"""The weight between soft and hard targets. `build(config.loss.weighting, steps=...)` makes the configured one."""

from distill.weighting.calibration import Calibration
from distill.weighting.confidence import Confidence
from distill.weighting.constant import Constant
from distill.weighting.gap import Gap
from distill.weighting.gate import Gate
from distill.weighting.gradients import Gradients
from distill.weighting.interface import StepStats, Weighting
from distill.weighting.lead import Lead
from distill.weighting.maturity import Maturity
from distill.weighting.repair import Repair
from distill.weighting.schedule import Schedule
from distill.weighting.slope import Slope
from distill.weighting.uncertainty import Uncertainty
from herd.run import weighting as settings_of

__all__ = ["Slope", "StepStats", "Weighting", "build"]


def build(settings: settings_of.Weighting, *, steps: int) -> Weighting:
    """The weighting these settings describe, for a run of this many student steps."""
    match settings:
        case settings_of.ConstantAlpha():
            return Constant(settings.alpha)
        case settings_of.ScheduledAlpha():
            return Schedule(settings, steps=steps)
        case settings_of.LeadAlpha():
            return Lead(settings, steps=steps)
        case settings_of.MaturityAlpha():
            return Maturity(settings)
        case settings_of.ConfidenceAlpha():
            return Confidence(settings)
        case settings_of.GateAlpha():
            return Gate(settings, steps=steps)
        case settings_of.RepairAlpha():
            return Repair(settings)
        case settings_of.GapAlpha():
            return Gap(settings, steps=steps)
        case settings_of.GradientAlpha():
            return Gradients(settings, steps=steps)
        case settings_of.UncertaintyAlpha():
            return Uncertainty(settings)
        case settings_of.CalibrationAlpha():
            return Calibration(settings, steps=steps)
        case settings_of.SlopeAlpha():
            return Slope(settings)
    raise AssertionError(f"no weighting for {settings!r}")
