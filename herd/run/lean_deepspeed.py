"""DeepSpeed without what no run here uses: at its own import it loads MLflow, and later torch's compiler for Muon.

load()          before the first import of DeepSpeed; spares every process about five CPU seconds of its start
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MUON = "deepspeed.runtime.zero.muon.original_muon"


def load() -> None:
    """Import DeepSpeed. Its autotuner goes without MLflow, its Muon runs as it is written."""
    if "deepspeed" not in sys.modules:
        with _absent("mlflow"):
            importlib.import_module("deepspeed")
    if MUON not in sys.modules:
        with _uncompiled():
            importlib.import_module(MUON)


@contextmanager
def _absent(name: str) -> Iterator[None]:
    """Make imports of a package fail as if it were not installed, unless it is loaded already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # what `import` looks at first
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Make DeepSpeed's decorator for torch.compile leave functions as they are."""
    from deepspeed.runtime import compiler

    kept, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        yield
    finally:
        compiler.compile = kept
