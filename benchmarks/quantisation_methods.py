"""What each method of `quant` costs a trained model, at equal bits: divergence, agreement, seconds.

    python benchmarks/quantisation_methods.py --model runs/nano/students/scout [--group-sizes 64 128] [--draws 2]

One rounding of one model is a noisy sample, so hidden channels are shuffled (which leaves the function as it is)
and every method runs on every shuffle. KL is that of the bf16 models as they run; "same routes" is in fp32 with the
unquantised model's routes, without tokens whose router was a toss-up. Writes results/quantisation_methods.json.

N rows, T tokens, V vocabulary, M scored tokens.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from int4_scales import shuffle
from routes import routes
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import quant
from herd.data.streams import fixed_batches
from herd.data.tokenizer import load_tokenizer
from herd.llama4 import use_sparse_experts
from herd.run.schema import Data
from quant.calibration.rows import calibration_rows
from quant.calibration.settings import Calibration
from quant.loading import route_experts
from quant.methods.names import METHODS

RESULTS = Path(__file__).parent / "results" / "quantisation_methods.json"


def log_probabilities(model: PreTrainedModel, rows_NT: Tensor) -> list[Tensor]:
    """log p of the next token, fp32, by batches of 8 rows."""
    with torch.inference_mode():
        return [model(input_ids=part_NT).logits.float().log_softmax(-1) for part_NT in rows_NT.split(8)]


def divergence(reference: list[Tensor], other: list[Tensor]) -> tuple[Tensor, float]:
    """KL of every token [M], float64, and the share of tokens whose likeliest successor is the same."""
    kl = [
        (r.double().exp() * (r.double() - o.double())).sum(-1).flatten() for r, o in zip(reference, other, strict=True)
    ]
    same = [(r.argmax(-1) == o.argmax(-1)).flatten() for r, o in zip(reference, other, strict=True)]
    return torch.cat(kl), torch.cat(same).double().mean().item()


def measure(options: argparse.Namespace) -> list[dict]:
    """One row a group size and method, over all draws."""
    data = Data(sequence_length=options.row_tokens, calibration_fraction=0.05)
    batches = fixed_batches(data, load_tokenizer(options.model), "heldout", rows=options.rows)
    rows_NT = torch.cat([batch.input_ids_BT for batch in batches])
    drawn = calibration_rows(data, options.model, rows=options.calibration_rows)
    calibration = Calibration(drawn, first=options.calibration_rows)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, local_files_only=True).eval()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found: dict[tuple[int, str], list[dict]] = {}
    for draw in range(options.draws):
        model.load_state_dict(shuffle(original, draw))
        for group_size in options.group_sizes:
            for method in options.methods:
                found.setdefault((group_size, method), []).append(
                    score(model, options.scheme, method, group_size, calibration, rows_NT)
                )
                print(draw, group_size, method, found[group_size, method][-1], file=sys.stderr, flush=True)
    return [summary(found, options, *key) for key in found]


def score(
    model: PreTrainedModel, scheme: str, method: str, group_size: int, calibration: Calibration, rows_NT: Tensor
) -> dict[str, float]:
    """Quantise with one method and compare, as the models run and with the routes of the unquantised one."""
    started = time.monotonic()
    calibrated = METHODS[method].calibrated
    quantized = quant.quantize(
        model, scheme=scheme, group_size=group_size, method=method, calibration=calibration if calibrated else None
    )
    seconds = time.monotonic() - started
    # Of the same form, split experts, so that only the weights differ.
    rounded = route_experts(quantized.model)
    exact = use_sparse_experts(AutoModelForCausalLM.from_config(model.config).to(torch.bfloat16).eval())
    exact.load_state_dict(model.state_dict())
    kl_M, agreement = divergence(log_probabilities(exact, rows_NT), log_probabilities(rounded, rows_NT))
    record: list[Tensor] = []
    exact.float()
    with routes(exact, record, replay=False):
        reference = log_probabilities(exact, rows_NT)
    rounded.float()
    with routes(rounded, record, replay=True):
        same_M, _ = divergence(reference, log_probabilities(rounded, rows_NT))
    return {
        "kl": kl_M.mean().item(),
        "kl_p99": kl_M.quantile(0.99).item(),
        "top1_agreement": agreement,
        "kl_same_routes": same_M.mean().item(),
        "seconds": seconds,
    }


def summary(found: dict, options: argparse.Namespace, group_size: int, method: str) -> dict:
    """Means over draws, and ratios to the first method, paired by draw."""
    row = {"scheme": options.scheme, "group_size": group_size, "method": method}
    mine, first = found[group_size, method], found[group_size, options.methods[0]]
    for key in mine[0]:
        row[key] = statistics.mean(each[key] for each in mine)
    for key in ("kl", "kl_same_routes"):
        row[f"{key}_ratio"] = statistics.mean(m[key] / f[key] for m, f in zip(mine, first, strict=True))
    return row


def main() -> int:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, required=True, help="trained, unquantised Llama 4 folder with a tokenizer"
    )
    parser.add_argument("--scheme", default="int4", help="int4")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="all; ratios are to the first")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[64, 128], help="64 128")
    parser.add_argument("--draws", type=int, default=2, help="shuffles (2)")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows (32)")
    parser.add_argument("--row-tokens", type=int, default=256, help="tokens of a row (256)")
    parser.add_argument("--calibration-rows", type=int, default=128, help="calibration rows (128)")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    table = measure(options)
    for row in table:
        print(
            f"g{row['group_size']:<4d}{row['method']:10s} KL {row['kl']:.5f} (x{row['kl_ratio']:.3f})"
            f"  p99 {row['kl_p99']:.4f}  top-1 {row['top1_agreement']:.4f}  same routes {row['kl_same_routes']:.5f}"
            f" (x{row['kl_same_routes_ratio']:.3f})  {row['seconds']:.0f} s"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    settings = {"model": str(options.model), "rows": options.rows, "row_tokens": options.row_tokens}
    settings |= {"draws": options.draws, "calibration_rows": options.calibration_rows}
    RESULTS.write_text(json.dumps(settings | {"table": table}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
