"""What it brings GPTQ to count a token by one over the size of its residual stream: KL with over KL without, paired.

    python benchmarks/token_weights.py --model runs/quality/*/students/scout [--rows 64]

int4 in groups of 128 (attention of dense models stays bf16), 64 calibration rows. "Same routes": in fp32 with the
unquantised model's choice of experts, so that a toss-up is no noise. Brackets: 95 %, over documents for a model, over
models (of log ratios, Student's t) for the mean. Writes results/token_weights.json.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from quantisation_methods import divergence, log_probabilities, routes
from scipy import stats
from torch import Tensor

from evals.heldout import rows_from
from evals.intervals import bootstrap_ratio, group_rows
from evals.loading import load_model
from herd.run.files import write_atomic
from herd.run.lineage import read_lineage
from herd.run.schema import Data
from quant.calibration.rows import calibration_rows
from quant.calibration.settings import Calibration
from quant.calibration.tensors import CalibratedTensors
from quant.loading import route_experts
from quant.methods.gptq import Gptq
from quant.plans import make_plan
from quant.quantized import fake_quantised
from quant.schemes import Scheme
from quant.sources import open_source

RESULTS = Path(__file__).parent / "results" / "token_weights.json"


def compare(folder: Path, rows: int, calibration: int) -> dict[str, Any]:
    """One model: KL without and with weights, and their ratio, as it runs and with the same routes."""
    data = Data.model_validate(read_lineage(folder)["data_config"])
    given = Calibration(calibration_rows(data, folder, rows=calibration), first=calibration, expert_tokens=0)
    held, reference = rows_from(data, folder, rows=rows), load_model(folder)
    groups = group_rows(held.documents_N)
    source = open_source(folder)
    plan = make_plan(source, Scheme.named("int4", 128), ignore=() if _moe(folder) else ["*.self_attn.*"])

    rows_NT = held.input_ids_NT
    record: list[Tensor] = []
    running = log_probabilities(reference, rows_NT)
    with routes(reference.float(), record, replay=False):
        exact = log_probabilities(reference, rows_NT)

    def kl_G(weighs_tokens: bool) -> dict[str, NDArray]:
        tensors = CalibratedTensors(plan, source, Gptq(weighs_tokens=weighs_tokens), given)
        made = route_experts(fake_quantised(plan, dict(tensors.items())))
        found = {"as it runs": divergence(running, log_probabilities(made, rows_NT))[0]}
        with routes(made.float(), record, replay=True):
            found["same routes"] = divergence(exact, log_probabilities(made, rows_NT))[0]
        return {name: groups.sum(kl_M.view(len(rows_NT), -1).sum(-1).numpy()) for name, kl_M in found.items()}

    without, weighted = kl_G(False), kl_G(True)
    facts: dict[str, Any] = {"model": str(folder)}
    for name in without:
        facts[name] = {
            "kl_without": without[name].sum() / rows_NT.numel(),
            "kl_with": weighted[name].sum() / rows_NT.numel(),
            "ratio": weighted[name].sum() / without[name].sum(),
            "ratio_ci95": bootstrap_ratio(weighted[name], without[name]),
        }
    return facts


def _moe(folder: Path) -> bool:
    return "num_local_experts" in json.loads((folder / "config.json").read_text())


def pooled(ratios: list[float]) -> list[float]:
    """The geometric mean and its 95 % interval over models."""
    logs = np.log(ratios)
    margin = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    return [math.exp(value) for value in (logs.mean(), logs.mean() - margin, logs.mean() + margin)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="trained bf16 folders with lineage")
    parser.add_argument("--rows", type=int, default=64, help="held-out rows (64)")
    parser.add_argument("--calibration-rows", type=int, default=64, help="calibration rows (64)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    table = []
    for folder in options.model:
        table.append(compare(folder, options.rows, options.calibration_rows))
        for name in ("as it runs", "same routes"):
            line = "{kl_without:.5f} -> {kl_with:.5f}, x{ratio:.3f} {ratio_ci95}".format(**table[-1][name])
            print(f"{folder}, {name}: {line}", flush=True)
    means = {}
    for name in ("as it runs", "same routes"):
        mean, low, high = pooled([row[name]["ratio"] for row in table])
        print(f"{len(table)} models, {name}: x{mean:.3f} [{low:.3f}, {high:.3f}]")
        means[name] = {"ratio": mean, "ratio_ci95": [low, high]}
    write_atomic(RESULTS, json.dumps({"mean": means, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
