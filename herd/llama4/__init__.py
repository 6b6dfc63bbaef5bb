"""Llama 4 as the herd uses it: specs, counts, plans, sparse experts, expert parallelism, balance.

    from herd.llama4 import SPECS, build, use_sparse_experts
    model = use_sparse_experts(build("scout-nano", seed=0))

Names load on first use: `SPECS` needs no torch, so a command can check a spec's name before the heavy imports.
"""

import importlib
from typing import Any

_HOMES = {
    "SPECS": "specs",
    "Spec": "specs",
    "find_spec": "specs",
    "build": "model",
    "restore_rope": "model",
    "Counts": "counts",
    "count": "counts",
    "forward_flops": "counts",
    "training_flops": "counts",
    "kv_bytes": "counts",
    "use_sparse_experts": "experts",
    "RouterTap": "balance",
    "ExpertLoad": "balance",
    "balance_loss": "balance",
    "install_preset": "expert_parallel",
    "experts_divisible": "plan",
    "full_state_dict": "expert_parallel",
    "Plan": "plan",
    "plan": "plan",
    "Setup": "plan",
    "state_bytes": "plan",
    "tokens_per_day": "plan",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import the public name from the file that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
