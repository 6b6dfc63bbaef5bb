"""Learning rates over a run: warmup, then stable and decay, a cosine, or a constant.

lr = learning_rate(config.optim, step, steps=400, peak=2e-3)
"""

import math

from herd.run.schema import Optim


def learning_rate(optim: Optim, step: int, *, steps: int, peak: float) -> float:
    """Rate of this step (0 for the first) in a run of `steps`; linear warmup, then the configured shape.

    `wsd` holds the peak and falls linearly over the last `decay` share to `final_lr` of it (MiniCPM 2404.06395).
    """
    warmup = max(1, round(optim.warmup * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = optim.final_lr
    if optim.schedule == "constant":
        share = 1.0
    elif optim.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        share = floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    else:
        decay = max(1, round(optim.decay * steps))
        progress = max(0.0, (step + 1 - (steps - decay)) / decay)
        share = 1.0 - (1 - floor) * progress
    return peak * share
