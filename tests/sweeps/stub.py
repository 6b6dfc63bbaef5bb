"""A stand-in for a training run: the same flags, the same files, a known optimum, and no training.

Held-out loss falls towards (log10(optim.lr) + 2.5)^2 + seed / 1000 over run.steps steps. STUB_SECONDS a step;
STUB_FAIL=CODE ends with that code; every start is a line in `starts` beside the run folders. Goes on from what
metrics.jsonl holds. Reads its few settings itself: to import the schema costs ten times as much.
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
    if code := os.environ.get("STUB_FAIL"):
        print("error: the stub was told to fail", file=sys.stderr)
        return int(code)
    path = folder / "metrics.jsonl"
    done = len(path.read_text().splitlines()) if path.exists() else 0
    floor = (math.log10(rate) + 2.5) ** 2 + int(sets["run.seed"]) / 1000
    with path.open("a") as file:
        for step in range(done + 1, int(sets["run.steps"]) + 1):
            time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
            record = {"step": step, "heldout/scout": floor + 1 / step, "pid": os.getpid()}
            file.write(json.dumps(record) + "\n")
            file.flush()
    Path(folder / "done").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
