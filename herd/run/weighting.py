"""How soft and hard targets are mixed: the designs of `loss.weighting`, told apart by `kind`.

The formulae, what each measured, and the choice of the default: docs/weighting.md.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from herd.run.section import Fraction, Section

Horizon = Annotated[float, Field(gt=0.0, le=1.0)]


class ConstantAlpha(Section):
    kind: Literal["constant"]
    alpha: Fraction = 0.5
    """Weight of the soft target; the hard one has 1 - alpha."""


class ScheduledAlpha(Section):
    kind: Literal["schedule"]
    shape: Literal["linear", "cosine", "staged"] = "linear"
    start: Fraction = 0.0
    end: Fraction = 0.9
    begin: Fraction = 0.0
    """Share of the steps after which the change begins."""
    until: Fraction = 1.0
    """Share of the steps after which it is complete; `staged` jumps there."""

    @model_validator(mode="after")
    def _ordered(self) -> "ScheduledAlpha":
        if self.begin > self.until:
            raise ValueError(f"begin = {self.begin} is after until = {self.until}; put them in order")
        return self


class LeadAlpha(Section):
    kind: Literal["lead"]
    peak: Fraction = 0.9
    """Weight of the soft target where the teacher is far ahead."""
    margin: Fraction = 0.06
    """Lead, as a share of the run's steps, up to which the teacher is not listened to at all (the dead zone)."""
    width: float = Field(0.06, gt=0.0)
    """Lead beyond the margin over which the weight rises to its peak."""
    doubt: float = Field(0.9, ge=0.0, lt=1.0)
    """Trust up to which the teacher is not listened to; the weight rises to its peak at trust 1."""
    noise: float = Field(0.05, ge=0.0)
    """Nats of advantage that are taken for none."""
    horizon: Horizon = 0.05
    """Share of the run's steps the running means reach back."""


class MaturityAlpha(Section):
    kind: Literal["maturity"]
    peak: Fraction = 0.9
    """Weight of the soft target of a mature teacher that leads towards the truth."""
    scale: float = Field(0.25, gt=0.0)
    """Nats ahead at which a teacher that learns no more is mature; one that still learns needs its growth on top."""
    sure: float = Field(0.8, ge=0.0, le=1.0)
    """Trust from which the weight is not lowered: noisy labels keep that of a perfect teacher below 1."""


class ConfidenceAlpha(Section):
    kind: Literal["confidence"]
    measure: Literal["peak", "entropy"] = "entropy"
    """Per token, 1 - max p, or the teacher's entropy as a share of the largest possible one."""


class GateAlpha(Section):
    kind: Literal["gate"]
    sharpness: float = Field(1.0, gt=0.0)
    """Of the sigmoid over log p(label) minus its running mean, per nat."""
    horizon: Horizon = 0.05
    """Share of the run's steps the running mean reaches back."""


class RepairAlpha(Section):
    kind: Literal["repair"]
    peak: Fraction = 1.0
    """Weight of the soft target where the teacher's first choice is the label."""
    margin: float = Field(0.2, ge=0.0, lt=1.0)
    """Elsewhere the mixed target's mass of the label exceeds that of any other class by this."""


class GapAlpha(Section):
    kind: Literal["gap"]
    over: Literal["token", "step", "entropy"] = "entropy"
    """Where student and teacher are compared: on each label, in the running mean, or in that of each entropy bin."""
    peak: Fraction = 0.9
    """Largest weight of the soft target."""
    scale: float = Field(0.25, gt=0.0)
    """Nats the teacher is ahead at the peak; with `token`, of the sigmoid."""
    horizon: Horizon = 0.05
    """Share of the run's steps the running means reach back."""


class GradientAlpha(Section):
    kind: Literal["gradients"]
    rule: Literal["norms", "mgda", "surgery"] = "norms"
    """Equal norms of both parts; the mix of least norm (MGDA); or the sum of both after PCGrad's projections."""
    over: Literal["token", "step"] = "step"
    """Of each token's gradients, or of their running mean squares and products."""
    kappa: float = Field(1.0, gt=0.0)
    """`norms`: how many times the hard part's norm the soft part's shall be."""
    horizon: Horizon = 0.05
    """Share of the run's steps the running means reach back."""


class UncertaintyAlpha(Section):
    kind: Literal["uncertainty"]
    rate: float = Field(0.05, gt=0.0, le=1.0)
    """Learning rate of the two log variances."""
    bound: float = Field(3.0, gt=0.0)
    """Largest absolute value of both: a divergence near 0 would make the soft weight grow without end."""


class CalibrationAlpha(Section):
    kind: Literal["calibration"]
    reference: Literal["teacher", "student"] = "student"
    """What the teacher's error is measured by: its own over-confidence, or also how far it misses as seen from
    the student."""
    peak: Fraction = 0.95
    """Largest weight of the soft target."""
    horizon: Horizon = 0.05
    """Share of the run's steps the running means reach back."""


class SlopeAlpha(Section):
    kind: Literal["slope"]
    start: Fraction = 0.5
    """Weight of the soft target until held-out losses say more."""
    probe: float = Field(0.2, gt=0.0, le=0.5)
    """How far the weight is moved up and down, in turn, between evaluations."""
    pace: float = Field(0.1, gt=0.0, le=0.5)
    """How far its middle moves after each evaluation, towards the side that fell faster."""


Weighting = Annotated[
    ConstantAlpha
    | ScheduledAlpha
    | LeadAlpha
    | MaturityAlpha
    | ConfidenceAlpha
    | GateAlpha
    | RepairAlpha
    | GapAlpha
    | GradientAlpha
    | UncertaintyAlpha
    | CalibrationAlpha
    | SlopeAlpha,
    Field(discriminator="kind"),
]
"""Any one of them."""
