"""What every number format costs: KL to the bf16 model, on held-out rows, beside the bits a weight takes.

    python benchmarks/formats.py --model runs/nano/students/maverick [--rows 16] [--row-tokens 128]

Rounding to nearest, no calibration. Every model runs through the same modules, so that only the weights (and, where the
format says so, the activations) differ. Writes results/formats.json.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import quant
from herd.data.corpora import open_corpus
from herd.run.errors import ConfigError
from herd.run.schema import Data
from quant.architectures import assemble
from quant.loading import route_experts
from quant.plans import make_plan
from quant.readers import GROUP_SIZES, SCHEMES
from quant.schemes import Scheme
from quant.sources import open_source

RESULTS = Path(__file__).parent / "results" / "formats.json"


def heldout_rows(folder: Path, rows: int, length: int) -> Tensor:
    """The first tokens [N, T] of held-out documents of the embedded corpus."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found: list[list[int]] = []
    for document in open_corpus(Data()).documents("heldout"):
        ids = tokenizer(document.text[: 16 * length])["input_ids"]
        found += [ids[:length]] if len(ids) >= length else []
        if len(found) == rows:
            break
    return torch.tensor(found)


def unquantised(folder: Path) -> PreTrainedModel:
    """The bf16 model with one module an expert, as the quantised ones have them."""
    with open_source(folder) as source:
        plan = make_plan(source, Scheme.named("fp8"))
        state = {name: plan.read_kept(source, name) for name in plan.kept}
        state |= {f"{layer.name}.weight": plan.read_layer(source, layer).bfloat16() for layer in plan.layers}
    return assemble(plan.config, state).eval()


def log_probabilities(model: PreTrainedModel, rows_NT: Tensor) -> Tensor:
    """log p [N, T, V] in fp32."""
    with torch.inference_mode():
        return torch.cat([model(input_ids=part).logits.float().log_softmax(-1) for part in rows_NT.split(4)])


def measure(folder: Path, rows_NT: Tensor) -> list[dict]:
    """One row a scheme and group size that fits the model."""
    reference_NTV = log_probabilities(route_experts(unquantised(folder)), rows_NT)
    results = []
    for name, kind in SCHEMES.items():
        for size in GROUP_SIZES if kind.grouped else (64,):
            try:
                made = quant.quantize(folder, scheme=name, group_size=size)
            except ConfigError as misfit:  # a block that does not divide, or a scheme that needs calibration
                print(f"{name} {size}: {misfit}", file=sys.stderr)
                continue
            found_NTV = log_probabilities(route_experts(made.model), rows_NT)
            kl_NT = (reference_NTV.exp() * (reference_NTV - found_NTV)).sum(-1)
            results.append(
                {
                    "scheme": made.plan.allocation.label,
                    "bits": made.plan.bits_per_quantised_weight,
                    "kl": kl_NT.mean().item(),
                    "kl_error": statistics.stdev(kl_NT.mean(-1).tolist()) / len(kl_NT) ** 0.5,
                    "kl_p99": kl_NT.flatten().quantile(0.99).item(),
                    "top1_agreement": (reference_NTV.argmax(-1) == found_NTV.argmax(-1)).float().mean().item(),
                }
            )
            print(json.dumps(results[-1]), flush=True)
    return results


def main() -> int:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="trained, unquantised folder with a tokenizer")
    parser.add_argument("--rows", type=int, default=16, help="held-out rows (16)")
    parser.add_argument("--row-tokens", type=int, default=128, help="tokens of a row (128)")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results = measure(options.model, heldout_rows(options.model, options.rows, options.row_tokens))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"rows": options.rows, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
