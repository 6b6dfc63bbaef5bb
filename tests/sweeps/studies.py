"""Small studies over the smoke configuration, run by the stub."""

import sys
from pathlib import Path
from typing import Any

from sweeps import Objective, Range, Study

ROOT = Path(__file__).resolve().parents[2]
STUB = [sys.executable, "-m", "tests.sweeps.stub"]


def make(folder: Path, **changes: Any) -> Study:
    settings: dict[str, Any] = {
        "name": "stubbed",
        "folder": folder,
        "base": ROOT / "configs" / "smoke.yaml",
        "set": ["run.steps=4", "tracking.enabled=false"],
        "space": {"optim.lr": Range(low=1e-4, high=1e-1, log=True)},
        "objectives": [Objective(metric="heldout/scout")],
        "budget": {"trials": 5},
        "launch": {"program": STUB},
    }
    return Study(**(settings | changes))
