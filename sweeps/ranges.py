"""What one path of a configuration may be: a range of numbers, or a choice among values of any kind.

Range(low=1e-4, high=1e-2, log=True); Range(low=4, high=16, step=4).count; Choices(choices=[{"kind": "lead"}, 0.5])
"""

from decimal import Decimal
from typing import Any

from pydantic import Field, field_validator, model_validator

from herd.run import config_text
from herd.run.section import Section

MOST_POINTS = 1_000_000


class Range(Section):
    low: float | int
    high: float | int
    log: bool = False
    """Sample the logarithm."""
    step: float | int | None = Field(None, gt=0)
    """Only low, low + step, ..."""

    @property
    def whole(self) -> bool:
        """Whole numbers only: both ends are written without a point."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def last(self) -> float | int:
        """The highest value there is: `high`, or the last step below it."""
        return self.high if self.step is None else self.point(self.count - 1)

    @property
    def count(self) -> int:
        """How many values a range with a step has."""
        low, high, step = (Decimal(str(value)) for value in (self.low, self.high, self.step))
        return int((high - low) // step) + 1

    def point(self, index: int) -> float | int:
        """One of them: decimal numbers as they are written, low + 2 * 0.1 is low + 0.2."""
        value = Decimal(str(self.low)) + index * Decimal(str(self.step))
        return int(value) if self.whole else float(value)

    @field_validator("low", "high", "step", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f"{str(value).lower()} is no number; use choices: [false, true]")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if self.low == self.high:
            raise ValueError(f"low and high are both {self.low}; make high larger, or take the path out of the space")
        if self.low > self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}; swap them")
        if self.log and self.low <= 0:
            raise ValueError(f"low = {self.low} has no logarithm; use a low above 0, or log: false")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude one another; drop one")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(
                f"step = {self.step} leads beyond high = {self.high} at once; use {self.high - self.low:g} or less"
            )
        if self.step is not None and (self.high - self.low) / self.step > MOST_POINTS:
            raise ValueError(f"step = {self.step} makes more than {MOST_POINTS} values; use a larger one, or none")
        if self.step is not None and self.whole and self.step != int(self.step):
            raise ValueError(
                f"step = {self.step} between whole numbers; write low and high with a point, or a whole step"
            )
        return self


class Choices(Section):
    choices: list[Any] = Field(min_length=2)
    """Values of any kind, mappings and lists too."""

    @field_validator("choices")
    @classmethod
    def _different(cls, choices: list[Any]) -> list[Any]:
        texts = [config_text.write_inline(choice) for choice in choices]
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise ValueError(f"{twice[0]} is there {texts.count(twice[0])} times; give every choice once")
        return choices
