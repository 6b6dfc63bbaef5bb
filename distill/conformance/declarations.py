"""What a loss's signature cannot say, and its author declares: labels, reduction, tail, layout, dtype, divergence.

loss.conformance = {"labels": "unshifted"}       # or --declare labels=unshifted
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from herd.run.errors import ConfigError

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "plain_jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl", "tvd")
"""`plain_jsd` is b KL(p, m) + (1-b) KL(q, m), as in GKD; `jsd` the same over b (1-b)."""
ALLOWED: Mapping[str, tuple[str, ...]] = {
    "divergence": (*DIVERGENCES, "other"),
    "labels": ("aligned", "unshifted"),
    "reduction": ("mean", "sum"),
    "tail": ("bucket", "sampled"),
    "layout": ("TV", "BTV"),
    "dtype": ("float64", "float32"),
}


@dataclass(frozen=True)
class Declared:
    """Checked declarations."""

    divergences: tuple[str, ...] = ()
    """Names its `divergence` argument takes, or the one it is; empty: to be recognised. `other`: compare with none."""
    labels: str = "aligned"
    """aligned: label t belongs to logits t. unshifted: as a model takes them, the loss scores t against t + 1."""
    reduction: str = "mean"
    """Over tokens that have a label."""
    tail: str = "bucket"
    """What sparse targets say of classes not listed: together they have the rest; or nothing, being samples."""
    layout: str | None = None
    dtype: str | None = None

    @classmethod
    def of(cls, target: str, facts: Mapping[str, Any]) -> "Declared":
        """Raises ConfigError for a key or a value that does not exist."""
        for key, value in facts.items():
            if key not in ALLOWED:
                near = difflib.get_close_matches(key, ALLOWED, n=1)
                hint = f"did you mean {near[0]}?" if near else f"use some of {', '.join(ALLOWED)}"
                raise ConfigError(f"--declare {key} (for {target}): unknown; {hint}")
            wrong = [one for one in _words(value) if one not in ALLOWED[key]]
            if wrong:
                raise ConfigError(f"--declare {key}={wrong[0]} (for {target}): use {', '.join(ALLOWED[key])}")
        rest = {key: value for key, value in facts.items() if key != "divergence"}
        return cls(divergences=_words(facts.get("divergence", ())), **rest)

    def to_facts(self) -> dict[str, Any]:
        """What `of` reads, and JSON can hold."""
        facts = {key: getattr(self, key) for key in ALLOWED if key != "divergence"}
        facts["divergence"] = list(self.divergences)
        return {key: value for key, value in facts.items() if value is not None}


def _words(value: Any) -> tuple[str, ...]:
    return tuple(value.split(",")) if isinstance(value, str) else tuple(value)
