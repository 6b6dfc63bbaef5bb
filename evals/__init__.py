"""What a model is worth: held-out loss, divergence to a reference, size, memory and speed.

rows = evals.rows_from(config.data, "runs/nano/students/scout", rows=64)
with evals.Probe() as probe:                                # optional; one for several models saves start-ups
    result = evals.evaluate("runs/nano/students/scout", rows=rows, against="runs/nano/teacher", probe=probe)
"""

from importlib import import_module
from typing import Any

# Name -> module that defines it. Resolved on first use, so that `python -m evals --help` does not import torch.
_PUBLIC = {
    "Loaded": "evals.loading",
    "Probe": "evals.probe",
    "Result": "evals.result",
    "Rows": "evals.rows",
    "add_entries": "evals.result",
    "evaluate": "evals.evaluation",
    "load": "evals.loading",
    "rows_from": "evals.heldout",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'evals' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
