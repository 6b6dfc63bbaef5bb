"""A mean whose memory grows with what it has seen: of all n steps so far, step s counts as (s / n) ** (power - 1).

mean = GrowingMean(8); mean.add(0.5); mean.value; fall(fast, slow)

It lags 1 / power behind on the scale of log n, so it needs neither a horizon nor the length of the run.
"""


class GrowingMean:
    """The last value for the first `power` steps, then about the last 1 / power of all steps."""

    def __init__(self, power: float) -> None:
        self.power = power
        self._value, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """One step's value."""
        self._count += 1
        self._value += min(1.0, self.power / self._count) * (value - self._value)

    @property
    def value(self) -> float:
        return self._value

    def state_dict(self) -> dict[str, float]:
        return {"value": self._value, "count": self._count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._value, self._count = state["value"], int(state["count"])


def fall(fast: GrowingMean, slow: GrowingMean) -> float:
    """By how much a curve falls while its steps grow by a factor e: b of a - b log n, from two means of it."""
    return (slow.value - fast.value) / (1 / slow.power - 1 / fast.power)
