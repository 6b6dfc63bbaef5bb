"""A stand-in for a training run: the same flags, the same files, a known optimum, and no training.

Held-out loss falls towards (log10(optim.lr) + 2.5)^2 + seed / 1000 over run.steps steps. STUB_SECONDS a step;
STUB_FAIL=CODE ends with that code and STUB_LOSS=VALUE has that loss, with STUB_SEED for that seed alone;
STUB_METRIC is what the loss is called. STUB_LINGER seconds pass between the last step and the end. Every start is a
line in `starts` beside the run folders. Goes on from what metrics.jsonl holds.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import yaml


def main() -> int:
    words = sys.argv[1:]
    sets = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--set")
    base = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
    rate = float(sets.get("optim.lr", base["optim"]["lr"]))
    folder = Path(sets["run.folder"]) / sets["run.name"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "starts").open("a") as file:
        file.write(f"{folder.name}\n")
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "mlflow.json").write_text(json.dumps({"runs": {"main": f"mlflow-{folder.name}"}}))
    chosen = os.environ.get("STUB_SEED", sets["run.seed"]) == sets["run.seed"]
    if (code := os.environ.get("STUB_FAIL")) and chosen:
        print("error: the stub was told to fail", file=sys.stderr)
        return int(code)
    path = folder / "metrics.jsonl"
    done = len(path.read_text().splitlines()) if path.exists() else 0
    floor = (math.log10(rate) + 2.5) ** 2 + int(sets["run.seed"]) / 1000
    with path.open("a") as file:
        for step in range(done + 1, int(sets["run.steps"]) + 1):
            time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
            loss = float(os.environ["STUB_LOSS"]) if chosen and "STUB_LOSS" in os.environ else floor + 1 / step
            record = {"step": step, os.environ.get("STUB_METRIC", "heldout/scout"): loss, "pid": os.getpid()}
            file.write(json.dumps(record) + "\n")
            file.flush()
    time.sleep(float(os.environ.get("STUB_LINGER", "0")))
    Path(folder / "done").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
