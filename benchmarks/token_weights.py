"""What it brings GPTQ to count a token by one over the size of its residual stream: KL with over KL without, paired.

    python benchmarks/token_weights.py --model runs/quality/*/students/scout [--rows 128]

int4 in groups of 128 (attention of dense models stays bf16), 64 calibration rows. Brackets: 95 %, over documents for a
model, over models (of log ratios, Student's t) for the mean. Writes results/token_weights.json.
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
from scipy import stats

from evals.heldout import rows_from
from evals.intervals import bootstrap_ratio, group_rows
from evals.loading import load_model
from evals.scores import score_rows
from herd.run.files import write_atomic
from herd.run.lineage import read_lineage
from herd.run.schema import Data
from quant.calibration.rows import calibration_rows
from quant.calibration.settings import Calibration
from quant.calibration.tensors import CalibratedTensors
from quant.methods.gptq import Gptq
from quant.plans import make_plan
from quant.quantized import fake_quantised
from quant.schemes import Scheme
from quant.sources import open_source

RESULTS = Path(__file__).parent / "results" / "token_weights.json"


def compare(folder: Path, rows: int, calibration: int) -> dict[str, Any]:
    """One model: KL without and with weights, and their ratio."""
    data = Data.model_validate(read_lineage(folder)["data_config"])
    given = Calibration(calibration_rows(data, folder, rows=calibration), first=calibration, expert_tokens=0)
    held, reference = rows_from(data, folder, rows=rows), load_model(folder)
    groups = group_rows(held.documents_N)
    source = open_source(folder)
    plan = make_plan(source, Scheme.named("int4", 128), ignore=() if _moe(folder) else ["*.self_attn.*"])

    def kl_G(weighs_tokens: bool) -> NDArray:
        tensors = CalibratedTensors(plan, source, Gptq(weighs_tokens=weighs_tokens), given)
        made = fake_quantised(plan, dict(tensors.items()))
        return groups.sum(score_rows(made, held, reference=reference).divergence.kl_N)

    without_G, with_G = kl_G(False), kl_G(True)
    tokens = held.input_ids_NT.numel()
    return {
        "model": str(folder),
        "kl_without": without_G.sum() / tokens,
        "kl_with": with_G.sum() / tokens,
        "ratio": with_G.sum() / without_G.sum(),
        "ratio_ci95": bootstrap_ratio(with_G, without_G),
    }


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
    parser.add_argument("--rows", type=int, default=128, help="held-out rows (128)")
    parser.add_argument("--calibration-rows", type=int, default=64, help="calibration rows (64)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    table = []
    for folder in options.model:
        table.append(compare(folder, options.rows, options.calibration_rows))
        print("{model}: {kl_without:.5f} -> {kl_with:.5f}, x{ratio:.3f} {ratio_ci95}".format(**table[-1]), flush=True)
    mean, low, high = pooled([row["ratio"] for row in table])
    print(f"{len(table)} models: x{mean:.3f} [{low:.3f}, {high:.3f}]")
    write_atomic(RESULTS, json.dumps({"ratio": mean, "ratio_ci95": [low, high], "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
