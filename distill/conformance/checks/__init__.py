"""All checks of one target, in the order they are reported."""

from distill.conformance.checks import (
    alignment,
    bounds,
    gradient,
    head,
    identity,
    kept,
    mask,
    normalisation,
    sampling,
    sparse,
    temperature,
    vocabulary,
)
from distill.conformance.verdict import Check

CHECKS: tuple[Check, ...] = (
    *identity.CHECKS,
    *bounds.CHECKS,
    *vocabulary.CHECKS,
    *sparse.CHECKS,
    *sampling.CHECKS,
    *temperature.CHECKS,
    *mask.CHECKS,
    *normalisation.CHECKS,
    *gradient.CHECKS,
    *head.CHECKS,
    *alignment.CHECKS,
    *kept.CHECKS,
)
