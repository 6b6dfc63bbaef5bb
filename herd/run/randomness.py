"""Every random stream of a process (python, numpy, torch), seeded, saved and restored together.

seed_everything(config.run.seed, rank=ranks.rank())
torch.save(rng_state(), path); restore_rng(torch.load(path, weights_only=True))
"""

import random
from typing import Any

import numpy
import torch

SPREAD = 1_000_003  # a prime: ranks of neighbouring seeds do not share streams


def seed_everything(seed: int, *, rank: int = 0) -> None:
    """Seed all streams; the same seed on another rank gives other numbers, rank 0 gets the seed itself."""
    own = seed + SPREAD * rank
    random.seed(own)
    numpy.random.seed(own % 2**32)
    torch.manual_seed(own)


def rng_state() -> dict[str, Any]:
    """The state of all streams in tensors and plain numbers, so that torch.load(weights_only=True) reads it."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    state = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(keys.astype(numpy.int64)),
            "position": position,
            "has_gauss": has_gauss,
            "cached": cached,
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Continue every stream exactly where `rng_state` found it."""
    python, legacy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = legacy["keys"].numpy().astype(numpy.uint32)
    numpy.random.set_state((legacy["name"], keys, legacy["position"], legacy["has_gauss"], legacy["cached"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
