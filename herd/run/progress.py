"""Progress of a run on stderr: a bar on a terminal, a plain line every few seconds elsewhere, rank 0 only.

    with Progress(total=400, start=120) as progress:
        progress.update(121, tokens, {"teacher": 4.91, "scout": 5.02, "scout alpha": 0.12})

step 121/400  teacher 4.91  scout 5.02 (alpha 0.12)  2,310 tok/s  ETA 3:41
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from herd.run import launcher

BAR = "{bar:20} {desc}"
WINDOW = 20  # updates the speed is taken over


class Progress:
    """Shows where a run stands; inert on every rank but 0."""

    def __init__(
        self,
        *,
        total: int,
        start: int = 0,
        interval_s: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`total` and `start` are steps; `interval_s` seconds lie between plain lines (first and last always shown)."""
        self._total, self._interval_s, self._clock = total, interval_s, clock
        self._stream = sys.stderr if stream is None else stream
        self._seen: deque[tuple[float, int]] = deque([(clock(), start)], maxlen=WINDOW + 1)
        self._shown_at = float("-inf")
        self._bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        if launcher.is_main() and self._stream.isatty():
            self._bar = tqdm(
                total=self._total, initial=self._seen[0][1], file=self._stream, bar_format=BAR, dynamic_ncols=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Step just finished, tokens of the whole run so far, and what to show; `x alpha` is shown behind `x`."""
        if not launcher.is_main():
            return
        now = self._clock()
        self._seen.append((now, step))
        line = describe(step, self._total, values, steps_per_s=self._speed(), tokens_per_step=tokens / max(step, 1))
        if self._bar is not None:
            self._bar.set_description_str(line, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._shown_at >= self._interval_s or step >= self._total:
            self._shown_at = now
            self._stream.write(line + "\n")
            self._stream.flush()

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if launcher.is_main():
            tqdm.write(line, file=self._stream)

    def _speed(self) -> float:
        """Steps a second over the last updates."""
        (began, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / max(now - began, 1e-9)


def describe(step: int, total: int, values: Mapping[str, float], *, steps_per_s: float, tokens_per_step: float) -> str:
    """One readable line: step, losses with their alpha, tokens a second, time left."""
    parts = [f"step {step}/{total}"]
    for name, value in values.items():
        if name.endswith(" alpha") and name.removesuffix(" alpha") in values:
            continue
        alpha = values.get(f"{name} alpha")
        parts.append(f"{name} {value:.2f}" + (f" (alpha {alpha:.2f})" if alpha is not None else ""))
    parts.append(f"{steps_per_s * tokens_per_step:,.0f} tok/s")
    parts.append(f"ETA {clock_face((total - step) / steps_per_s) if steps_per_s > 0 else '?'}")
    return "  ".join(parts)


def clock_face(seconds: float) -> str:
    """3:41, 1:02:05 or 2d 3:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if not hours and not days:
        return f"{minutes}:{rest:02d}"
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{rest:02d}"
