"""Shrinkage between a noisy label and a biased teacher: alpha = V / (V + B), in each bin of teacher entropy.

    V = 1 - E|p|^2        variance of the label around the truth, were p the truth
    B = 2 max(0, E|p|^2 - E p(label))                  reference `teacher`: over-confidence, 0 if it is calibrated
    B = max(that, E|q - p|^2 - E (q - p).(q - e))      reference `student`: what is left of the way to the teacher
                                                       when the part that goes towards the labels is taken off
Exact: E|e - p|^2 = (1 - |truth|^2) + |truth - p|^2, e drawn from the truth. Why two references: docs/weighting.md.
"""

from collections.abc import Sequence
from typing import Any

import torch

from distill.losses.token_stats import TokenStats
from distill.weighting import entropy_bins
from distill.weighting.interface import Means, StepStats, Weighting
from distill.weighting.running_mean import BinnedMeans, horizon_of
from herd.run.weighting import CalibrationAlpha


class Calibration(Weighting):
    """Running means by entropy bin. With the student as reference V is E (q - p).(q - e): see `alphas`."""

    def __init__(self, settings: CalibrationAlpha, *, steps: int) -> None:
        self._settings = settings
        self._means = BinnedMeans(("variance", "overconfidence", "way", "towards"), horizon_of(settings.horizon, steps))

    def alpha(self, tokens: TokenStats) -> torch.Tensor:
        tokens.teacher_square()  # both are asked for so that they are averaged
        if self._settings.reference == "student":
            tokens.products()
        return tokens.student_ce.new_tensor(self.alphas())[entropy_bins.of(tokens.teacher_entropy)]

    def alphas(self) -> list[float]:
        """Of every bin.

        A label's variance counts once for all the tokens that taught the student the same prediction. How many those
        are is not known, but what is left of it in the student's error is: E (q - p).(q - e) is |q - truth|^2 less what
        student and teacher have in common.
        """
        columns = [self._means.values(name) for name in ("variance", "overconfidence", "way", "towards")]
        return [self._settings.peak * self._share(*row) for row in zip(*columns, strict=True)]

    def _share(self, variance: float, overconfidence: float, way: float, towards: float) -> float:
        bias = 2 * max(0.0, overconfidence)
        if self._settings.reference == "student":
            variance, bias = max(0.0, towards), max(bias, way - towards)
        return variance / (variance + bias) if variance > 0 else 0.0

    def update(self, stats: StepStats) -> None:
        self._means.add(stats.bins, _quantities)

    def metrics(self) -> dict[str, float]:
        return {"overconfidence": max(self._means.values("overconfidence"))}

    def state_dict(self) -> dict[str, Any]:
        return self._means.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._means.load_state_dict(state)


def _quantities(of_bin: Means) -> Sequence[float]:
    square, label = of_bin.teacher_square, of_bin.label_mass
    return 1 - square, square - label, of_bin.soft_square, of_bin.cross
