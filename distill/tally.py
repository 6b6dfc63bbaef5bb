"""Sums of one optimiser step: losses, alphas and expert loads, added per micro-batch, reduced over ranks once.

    tally.add(stats_ST, valid_T, routing); Tally.reduce(tallies); tally.metrics("student/scout", with_targets=True)

Shapes: S statistics of distill.losses.kernel.STATS, T tokens, K bins of teacher entropy, Q sums of TALLIED, N feature
losses.
"""

from collections.abc import Iterable, Sequence

import torch

from distill.losses.kernel import STATS
from distill.weighting import entropy_bins
from distill.weighting.interface import Means, StepStats
from herd.llama4.balance import ExpertLoad
from herd.run import ranks

HISTOGRAM_BINS = 10
HISTOGRAM_NAMES = tuple(f"{low / HISTOGRAM_BINS:g}-{(low + 1) / HISTOGRAM_BINS:g}" for low in range(HISTOGRAM_BINS))
TALLIED = {  # what a weighting calls it -> its statistic
    "student_ce": "ce",
    "teacher_ce": "teacher_ce",
    "divergence": "kl",
    "distillation": "kd",
    "teacher_entropy": "teacher_entropy",
    "alpha": "alpha",
    "teacher_square": "teacher_square",
    "soft_square": "soft_square",
    "hard_square": "hard_square",
    "cross": "cross",
}


class Tally:
    """Nothing is read back to Python until the step is over, so no micro-batch waits for a number."""

    def __init__(self, top_k: int, feature_names: Sequence[str] = ()) -> None:
        self._sums = torch.zeros(len(STATS) + 1, dtype=torch.float64)
        self._bins_KQ = torch.zeros(entropy_bins.COUNT, len(TALLIED) + 2, dtype=torch.float64)
        self._alphas = torch.zeros(HISTOGRAM_BINS, dtype=torch.float64)
        self._balance = torch.zeros(2, dtype=torch.float64)
        self._feature_names = feature_names
        self._features = torch.zeros(len(feature_names), dtype=torch.float64)
        self._load = ExpertLoad(top_k)

    def add(self, stats_ST: torch.Tensor, valid_T: torch.Tensor, routing: list[torch.Tensor]) -> None:
        """Add one micro-batch of one model."""
        with torch.no_grad():
            self._sums[:-1] += stats_ST.sum(1).double().cpu()
            self._sums[-1] += valid_T.sum().cpu()
            alpha_T = stats_ST[STATS.index("alpha")][valid_T]
            self._alphas += torch.histc(alpha_T.float().cpu(), HISTOGRAM_BINS, 0.0, 1.0).double()
            self._bins_KQ += binned(stats_ST, valid_T).cpu()
            if routing:
                self._load.add(routing)

    def add_balance(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's load-balancing loss."""
        self._balance += torch.stack((loss.detach().double().cpu(), torch.ones((), dtype=torch.float64)))

    def beside(self) -> "Tally":
        """A tally for other tokens of the same model: its sums are its own, the experts' load is counted together."""
        other = Tally(self._load.top_k)
        other._load = self._load
        return other

    def add_features(self, sums_N: torch.Tensor) -> None:
        """Add one micro-batch's feature losses, each summed over its tokens."""
        self._features += sums_N.double().cpu()

    @staticmethod
    def reduce(tallies: Iterable["Tally"]) -> None:
        """Sum all of them over ranks, in one collective."""
        parts = [part for tally in tallies for part in tally._parts()]
        flat = ranks.all_reduce_sum(torch.cat([part.flatten() for part in parts]))
        for part, values in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(values.view_as(part))

    def _parts(self) -> list[torch.Tensor]:
        return [self._sums, self._bins_KQ, self._alphas, self._balance, self._features]

    def is_finite(self) -> bool:
        return all(bool(sums.isfinite().all()) for sums in (self._sums, self._balance, self._features))

    @property
    def num_tokens(self) -> int:
        """Valid tokens added."""
        return int(self._sums[-1])

    def mean(self, stat: str) -> float:
        """Mean of one statistic over valid tokens."""
        return (self._sums[STATS.index(stat)] / self._sums[-1].clamp_min(1)).item()

    def step_stats(self, step: int) -> StepStats:
        """Means over the tokens that had a target, as a weighting reads them."""
        whole = _means(self._bins_KQ.sum(0))
        return StepStats(step=step, bins=tuple(_means(sums_Q) for sums_Q in self._bins_KQ), **vars(whole))

    def metrics(self, label: str, *, with_targets: bool) -> dict[str, float | list]:
        """Global means under `label/`, in nats; nothing when no token was added."""
        if self.num_tokens == 0:
            return {}
        out: dict[str, float | list] = {f"{label}/ce": self.mean("ce")}
        if self._balance[1] > 0:
            out[f"{label}/balance"] = (self._balance[0] / self._balance[1]).item()
        means_N = (self._features / self._sums[-1].clamp_min(1)).tolist()
        out |= {f"{label}/features/{name}": mean for name, mean in zip(self._feature_names, means_N, strict=True)}
        if with_targets:
            out |= {f"{label}/{stat}": self.mean(stat) for stat in ("kd", "alpha", "teacher_entropy")}
            bins = [_means(sums_Q) for sums_Q in self._bins_KQ]
            out[f"{label}/alpha_by_entropy"] = [of_bin.alpha if of_bin.count else None for of_bin in bins]
            out[f"{label}/alpha_histogram"] = (self._alphas / self._alphas.sum().clamp_min(1)).tolist()
        return out

    def expert_metrics(self, name: str) -> dict[str, float | list]:
        """Load entropy, largest share, dead experts and the shares, under `experts/<name>/`; a collective call."""
        summary = self._load.take()
        return {f"experts/{name}/{key}": value for key, value in vars(summary).items()} if summary else {}


def binned(stats_ST: torch.Tensor, valid_T: torch.Tensor) -> torch.Tensor:
    """[K, Q] sums over the tokens with a target, fp64: their count, TALLIED, and p(label)."""
    used_T = valid_T & (stats_ST[STATS.index("absent")] == 0)
    read_TQ = stats_ST[[STATS.index(name) for name in TALLIED.values()]].T.double()
    label_mass_T = (-stats_ST[STATS.index("teacher_ce")].double()).exp()
    sums_TQ = torch.cat((torch.ones_like(read_TQ[:, :1]), read_TQ, label_mass_T[:, None]), 1)
    bin_T = entropy_bins.of(stats_ST[STATS.index("teacher_entropy")])
    # A product with one-hot rows adds in one order on every device; index_add on CUDA does not.
    of_bin_KT = bin_T == torch.arange(entropy_bins.COUNT, device=bin_T.device)[:, None]
    return (of_bin_KT & used_T).double() @ sums_TQ


def _means(sums_Q: torch.Tensor) -> Means:
    count, *sums = sums_Q.tolist()
    names = [*TALLIED, "label_mass"]
    return Means(count=count, **{name: total / max(count, 1.0) for name, total in zip(names, sums, strict=True)})
