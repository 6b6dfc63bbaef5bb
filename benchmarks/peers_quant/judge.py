"""Scores every row's weights alike: KL to the bf16 model, agreement, perplexity, and whether the row is what it claims.

    bench = Bench(model_folder, data, rows=128);  bench.judge(folder, group=128);  compare(table, bench, ...)

"Same routes" is the KL of a MoE in fp32 with the unquantised model's choice of experts: free of the luck of which
tokens change expert. Intervals: 95 %, bootstrapped over documents, paired for differences and ratios.

G documents, M tokens, K experts a token.
"""

import math
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from routes import routes
from safetensors.torch import load_file
from torch import Tensor

from evals.heldout import rows_from
from evals.intervals import bootstrap_ratio, group_rows
from evals.loading import load_model
from evals.scores import score_rows
from herd.run.schema import Data
from peers_quant.protocol import FUSED, QUANTISED, split

BASELINE = "ours gptq g128"


class Bench:
    """A bf16 model, its held-out rows, and the scores of whatever is compared with it."""

    def __init__(self, model: Path, data: Data, *, rows: int):
        self._folder = model
        self._rows = rows_from(data, model, rows=rows)
        self.groups = group_rows(self._rows.documents_N)

    @cached_property
    def _model(self) -> torch.nn.Module:
        return load_model(self._folder)

    @cached_property
    def _exact(self) -> tuple[torch.nn.Module, list[Tensor]]:
        """The model in fp32, and which experts [T, K] it chooses, batch by batch and layer by layer."""
        model, record = load_model(self._folder).float(), []
        with routes(model, record, replay=False):
            score_rows(model, self._rows)
        return model, record

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The bf16 weights [N, K] that every row quantises."""
        return split(self._tensors)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor for path in self._folder.glob("*.safetensors") for name, tensor in load_file(path).items()}

    def describe(self) -> dict[str, Any]:
        """What was scored."""
        rows, tokens = self._rows.input_ids_NT.shape
        return {"rows": rows, "row_tokens": tokens, "documents": self.groups.count, "source": self._rows.source}

    def scores(self, folder: Path) -> dict[str, NDArray]:
        """Per-row sums and per-token KL of a row's weights; kept beside them until the weights change."""
        kept, weights = folder / "scores.npz", folder / "model.safetensors"
        if not kept.exists() or kept.stat().st_mtime_ns < weights.stat().st_mtime_ns:
            for path in self._folder.glob("*.json"):
                shutil.copy(path, folder / path.name)
            scores = score_rows(load_model(folder), self._rows, reference=self._model)
            found = scores.divergence
            np.savez(
                kept, nats=scores.nats_N, tokens=scores.tokens_N, kl=found.kl_N, agreed=found.agreed_N,
                kl_M=found.kl_M, reference_nats=found.nats_N,
            )  # fmt: skip
        with np.load(kept) as file:
            return dict(file)

    @property
    def has_routers(self) -> bool:
        """Whether "same routes" says anything of its own."""
        return any(FUSED.match(name) for name in self._tensors)

    def same_routes(self, folder: Path) -> NDArray:
        """Per-row sums of the KL in fp32 with the unquantised model's routes; kept like `scores`, which come first."""
        kept, weights = folder / "same_routes.npy", folder / "model.safetensors"
        if not kept.exists() or kept.stat().st_mtime_ns < weights.stat().st_mtime_ns:
            exact, record = self._exact
            made = load_model(folder).float()
            with routes(made, record, replay=True):
                np.save(kept, score_rows(made, self._rows, reference=exact).divergence.kl_N)
        return np.load(kept)

    def judge(self, folder: Path, *, group: int | None) -> dict[str, Any]:
        """The figures of one row."""
        scores = self.scores(folder)
        tokens_G = self.groups.sum(scores["tokens"])
        tokens = tokens_G.sum()
        figures = {"kl": scores["kl"].sum() / tokens, "kl_p99": float(np.quantile(scores["kl_M"], 0.99))}
        figures |= {"top1_agreement": scores["agreed"].sum() / tokens}
        figures |= {"perplexity": math.exp(scores["nats"].sum() / tokens)}
        figures["kl_ci95"] = bootstrap_ratio(self.groups.sum(scores["kl"]), tokens_G)
        if self.has_routers:
            same_G = self.groups.sum(self.same_routes(folder))
            figures["kl_same_routes"] = same_G.sum() / tokens
            figures["kl_same_routes_ci95"] = bootstrap_ratio(same_G, tokens_G)
        figures["top1_agreement_ci95"] = bootstrap_ratio(self.groups.sum(scores["agreed"]), tokens_G)
        worse_G = self.groups.sum(scores["nats"] - scores["reference_nats"])
        figures["nats_difference"] = worse_G.sum() / tokens
        figures["nats_difference_ci95"] = bootstrap_ratio(worse_G, tokens_G)
        return figures | self.inspect(folder / "model.safetensors", group)

    def reference(self) -> dict[str, float]:
        """Perplexity of the bf16 model."""
        scores = score_rows(self._model, self._rows)
        return {"perplexity": math.exp(scores.nats_N.sum() / scores.tokens_N.sum())}

    def inspect(self, path: Path, group: int | None) -> dict[str, Any]:
        """Whether everything was quantised and nothing else: what no column of quality would show."""
        made = load_file(path)
        before, after = self.weights, split(made)
        assert before.keys() == after.keys() and made.keys() == self._tensors.keys()
        quantised = {n for n in made if FUSED.match(n) or QUANTISED.search(n.removesuffix(".weight"))}
        changed = [n for n in made.keys() - quantised if not torch.equal(made[n], self._tensors[n])]
        facts: dict[str, Any] = {
            "matrices": len(after),
            "matrices_untouched": sum(torch.equal(before[n], after[n]) for n in after),
            "others_changed": len(changed),
        }
        if group is not None:
            facts["most_levels"] = max(levels(weight_NK, group) for weight_NK in after.values())
        return facts


def levels(weight_NK: Tensor, group: int) -> int:
    """The largest number of different values in a group: at most 16 at four bits."""
    ordered = weight_NK.float().unflatten(1, (-1, group)).sort(-1).values
    return int((ordered.diff(dim=-1) != 0).sum(-1).max()) + 1


def compare(table: list[dict[str, Any]], bench: Bench, work: Path, keys: dict[str, str]) -> None:
    """Add to every row the ratio of its KL to the baseline's, paired by document; of the KL by same routes as well."""
    if not (work / keys[BASELINE] / "scores.npz").exists():
        return
    columns = {"kl": lambda folder: bench.scores(folder)["kl"]}
    if bench.has_routers:
        columns["kl_same_routes"] = bench.same_routes
    for column, read in columns.items():
        base_G = bench.groups.sum(read(work / keys[BASELINE]))
        for entry in table:
            if "error" not in entry:
                kl_G = bench.groups.sum(read(work / keys[entry["name"]]))
                entry[f"{column}_ratio"] = kl_G.sum() / base_G.sum()
                entry[f"{column}_ratio_ci95"] = bootstrap_ratio(kl_G, base_G)


def compare_codes(first: Path, second: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """How many FP8 codes and scales two rows share, and the ratio of their squared errors."""
    counts = {"codes": 0, "codes_equal": 0, "scales": 0, "scales_equal": 0}
    rows = [load_file(first), load_file(second)]
    errors = [0.0, 0.0]
    for name, weight_NK in weights.items():
        for kind in ("code", "scale"):
            mine, theirs = (row[f"{name}.{kind}"].flatten() for row in rows)
            counts[f"{kind}s"] += mine.numel()
            counts[f"{kind}s_equal"] += int((mine == theirs).sum())
        for i, row in enumerate(rows):
            value_NK = row[f"{name}.code"].view(torch.float8_e4m3fn).double() * row[f"{name}.scale"].double()
            errors[i] += (value_NK - weight_NK).square().sum().item()
    return counts | {"squared_error_ratio": errors[0] / errors[1]}
