"""Masses that a cache keeps: on average the teacher's own, neither cut off nor blown up.

Shapes: N rows, T tokens a row, K classes listed, M tokens in all.
"""

from collections.abc import Iterator

import torch

from distill.conformance.checks.sampling import SIGMAS
from distill.conformance.target import Target
from distill.conformance.verdict import Check, Comparison, NotApplicable, at_most

ROWS, TOKENS, CLASSES = 16, 128, 24
LISTED_MASS = 0.8
"""Of all mass, where the rest is a bucket's."""
ROUNDING = 1e-6


def kept_masses(target: Target) -> Iterator[Comparison]:
    """The mean over tokens that all have one distribution is within 4 sigma of it, class by class."""
    if not target.is_cache:
        raise NotApplicable("is a loss, no cache")
    generator = torch.Generator().manual_seed(103)
    share = 1.0 if target.declared.tail == "sampled" else LISTED_MASS
    probs_K = torch.softmax(torch.randn(CLASSES, generator=generator), 0) * share
    input_ids_NT = torch.randint(0, 50_000, (ROWS, TOKENS), generator=generator)
    ids_NTK, probs_NTK = (x_K.expand(ROWS, TOKENS, -1) for x_K in (torch.arange(CLASSES), probs_K))
    found_ids_NTK, found_NTK = target.function(input_ids_NT, ids_NTK, probs_NTK)(input_ids_NT)
    # Slots that are not used hold -1, which becomes the last place here.
    places_MK = found_ids_NTK.long().flatten(0, 1) % (CLASSES + 1)
    masses_MK = torch.zeros(len(places_MK), CLASSES + 1, dtype=torch.float64)
    masses_MK.scatter_add_(1, places_MK, found_NTK.double().flatten(0, 1))
    masses_MK = masses_MK[:, :CLASSES]
    error_K = masses_MK.std(0) / len(masses_MK) ** 0.5
    sigmas_K = (masses_MK.mean(0) - probs_K).abs() / (error_K + ROUNDING)
    for what, at in (("largest", int(probs_K.argmax())), ("smallest", int(probs_K.argmin()))):
        yield at_most(f"mean mass of the {what} class, sigmas from the truth", SIGMAS, sigmas_K[at].item())
    yield at_most(f"mean mass of each of {CLASSES} classes, most sigmas", SIGMAS, sigmas_K.max().item())


CHECKS = (
    Check(
        "kept_masses",
        "a cache keeps the teacher's masses on average: not renormalised, the tail not cut off",
        kept_masses,
        (3,),
        "DistillKit `zero`, top-k caches that divide by the listed mass",
    ),
)
