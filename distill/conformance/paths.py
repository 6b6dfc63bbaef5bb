"""Several targets that should be one loss: the same value and gradient for the same problem.

    paths_agree([dense, fused, sparse])      # each against the first; sparse ones list every class

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from distill.conformance.problem import draw
from distill.conformance.target import Target
from distill.conformance.verdict import Check, Comparison, NotApplicable, equal

NAME = "paths_agree"


def paths_agree(targets: Sequence[Target]) -> Iterator[Comparison]:
    """Compare all targets with the first."""
    whole = [one for one in targets if not one.is_cache and one.declared.tail != "sampled"]
    if len(whole) < 2:
        raise NotApplicable("needs two losses that read whole distributions: give --target twice")
    first, *others = whole
    for other in others:
        pair, within = f"{other.name} against {first.name}", max(first.within, other.within)
        for options in _settings(first, other):
            mine, theirs = (_answer(one, options) for one in (first, other))
            case = ", ".join(f"{name} {value}" for name, value in options.items()) or "plain"
            yield equal(f"{pair}: {case}", mine.value, theirs.value, within=within * max(1.0, abs(mine.value)))
            apart = (mine.gradient_TV - theirs.gradient_TV).abs().max().item()
            yield equal(f"{pair}: {case}, difference of gradients", 0.0, apart, within=within)


def _settings(first: Target, other: Target) -> Iterator[dict[str, Any]]:
    """Every option both have."""
    both = [name for name in first.divergences if name in other.divergences and name not in ("other", "unknown")]
    for name in both or [None]:
        chosen = {"divergence": name} if name else {}
        yield chosen
        if first.takes("temperature") and other.takes("temperature"):
            yield chosen | {"temperature": 2.0}
        if first.takes("alpha", "labels") and other.takes("alpha", "labels"):
            yield chosen | {"alpha": 0.3}


def _answer(target: Target, options: dict[str, Any]) -> Any:
    problem = draw(110, ignored=(4,) if target.masks else (), listed=None)
    given = {name: value for name, value in options.items() if target.takes(name)}
    return target.run(problem, **given)


def check_of(targets: Sequence[Target]) -> Check:
    """The check of these targets together."""
    return Check(
        NAME,
        "every path of a loss has the same value and gradient, at every temperature and alpha",
        lambda _: paths_agree(targets),
        (6, 7),
        "TRL GKD (temperature in one path only), TRL #5731 (another objective in one path)",
    )
