"""Which Int4 scale loses least: KL of a trained model under several recipes, same bits, same tokens.

    python benchmarks/int4_scales.py --model runs/nano/students/scout [--group-sizes 32 64 128] [--draws 4] [--rows 32]

One rounding of one model is a noisy sample, so hidden channels are shuffled (which leaves the model's function as it
is, but makes new groups) and every recipe runs on every shuffle. Writes results/int4_scales.json.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from herd.data.corpora import open_corpus
from herd.llama4.source import open_model
from herd.run.schema import Data
from quant.formats.grid import Grid, Parameters
from quant.formats.grid_search import Rounding, search_groups
from quant.loading import route_experts
from quant.plans import Plan, make_plan
from quant.quantized import fake_quantised
from quant.schemes import Scheme
from quant.sources import ModelSource

RESULTS = Path(__file__).parent / "results" / "int4_scales.json"
BASELINE = "absmax / 7.5 (compressed-tensors)"


def recipes() -> dict[str, Callable[[Tensor], Tensor]]:
    """Recipe name -> function from groups [M, S] to scales [M]."""
    return {
        "absmax / 8 (Meta)": lambda weight_MS: _rounded(weight_MS.abs().amax(-1) / 8),
        BASELINE: lambda weight_MS: _rounded(weight_MS.abs().amax(-1) / 7.5),
        "least |error|^2": lambda weight_MS: search(weight_MS, power=2.0, signs=(1,)),
        "least |error|^2.4": lambda weight_MS: search(weight_MS, power=2.4, signs=(1,)),
        "least |error|^2, either sign": lambda weight_MS: search(weight_MS, power=2.0, signs=(1, -1)),
        "least |error|^2.4, either sign": lambda weight_MS: search(weight_MS, power=2.4, signs=(1, -1)),
        "quant (least |error|^4, either sign, refined)": lambda weight_MS: search_groups(
            weight_MS, None, bits=4, symmetric=True
        )[0],
    }


def search(weight_MS: Tensor, *, power: float, signs: tuple[int, ...]) -> Tensor:
    """The best of 30 multiples of absmax / 7.5 per sign under one norm of the error."""
    rounding = Rounding(weight_MS, None, 4)
    full_M = weight_MS.abs().amax(-1) / 7.5
    best_M, least_M = _rounded(full_M), torch.full_like(full_M, torch.inf)
    for step in range(30):
        for sign in signs:
            scale_M = _rounded(full_M * sign * (0.5 + 0.02 * step))
            rounded_MS = rounding.codes(scale_M, None) * scale_M[:, None]
            error_M = (rounded_MS - weight_MS).abs().pow(power).sum(-1)
            wins_M = error_M < least_M
            best_M, least_M = torch.where(wins_M, scale_M, best_M), torch.where(wins_M, error_M, least_M)
    return best_M


def _rounded(scale_M: Tensor) -> Tensor:
    return torch.where(scale_M == 0, 1.0, scale_M.bfloat16().float())


def shuffle(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same function with hidden and intermediate channels in another order (Llama 4 or Llama names)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(state["model.norm.weight"].numel(), generator=generator)
    inner: dict[str, Tensor] = {}

    def order(name: str, size: int) -> Tensor:
        mlp = re.sub(r"\.(gate_up|gate|up|down)_proj.*", "", name)
        if mlp not in inner:
            inner[mlp] = torch.randperm(size, generator=generator)
        return inner[mlp]

    def move(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("experts.gate_up_proj"):
            half = tensor.shape[2] // 2
            columns = order(name, half)
            return tensor[:, hidden][:, :, torch.cat([columns, columns + half])]
        if name.endswith("experts.down_proj"):
            return tensor[:, order(name, tensor.shape[1])][:, :, hidden]
        if name.endswith("down_proj.weight"):
            return tensor[hidden][:, order(name, tensor.shape[1])]
        if re.search(r"(gate|up)_proj\.weight$", name):
            return tensor[order(name, tensor.shape[0])][:, hidden]
        if name.endswith("o_proj.weight") or tensor.ndim == 1:
            return tensor[hidden]
        return tensor[:, hidden]

    return {name: move(name, tensor).contiguous() for name, tensor in state.items()}


def quantise(plan: Plan, source: ModelSource, recipe: Callable[[Tensor], Tensor], group_size: int) -> PreTrainedModel:
    """The model with every layer of the plan rounded with the recipe's scales."""
    tensors = {name: plan.read_kept(source, name) for name in plan.kept}
    for layer in plan.layers:
        weight_NK = plan.read_layer(source, layer).float()
        parameters = Parameters(recipe(weight_NK.view(-1, group_size)).view(layer.shape[0], -1))
        stored = layer.scheme.store(Grid(4, True, group_size).encode(weight_NK, parameters), parameters)
        tensors |= {f"{layer.name}.{suffix}": tensor for suffix, tensor in stored.items()}
    return route_experts(fake_quantised(plan, tensors))


def heldout_rows(folder: Path, rows: int, length: int) -> Tensor:
    """Token rows [N, T] from held-out documents of the embedded corpus, at most two a document."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found: list[list[int]] = []
    for document in open_corpus(Data()).documents("heldout"):
        ids = tokenizer(document.text[: 16 * length])["input_ids"]
        found += [ids[start : start + length] for start in range(0, min(len(ids), 2 * length) - length + 1, length)]
        if len(found) >= rows:
            break
    return torch.tensor(found[:rows])


def log_probabilities(model: PreTrainedModel, rows_NT: Tensor) -> Tensor:
    """log p [N, T, V] in fp32."""
    with torch.inference_mode():
        return torch.cat([model(input_ids=part_NT).logits.float().log_softmax(-1) for part_NT in rows_NT.split(8)])


def measure(options: argparse.Namespace) -> list[dict]:
    """One row a group size and recipe: KL to the bf16 model over all draws."""
    model = open_model(str(options.model), dtype=torch.bfloat16).eval()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows_NT = heldout_rows(options.model, options.rows, options.row_tokens)
    found: dict[tuple[int, str], list[tuple[float, float, float]]] = {}
    for draw in range(options.draws):
        model.load_state_dict(shuffle(original, draw))
        source = ModelSource(model)
        # The bf16 reference runs through the same modules as the quantised ones, so that only the weights differ.
        reference_NTV = log_probabilities(model, rows_NT)
        for group_size in options.group_sizes:
            plan = make_plan(source, Scheme.named("int4", group_size))
            for name, recipe in recipes().items():
                rounded_NTV = log_probabilities(quantise(plan, source, recipe, group_size), rows_NT)
                kl_M = (reference_NTV.exp() * (reference_NTV - rounded_NTV)).sum(-1).flatten()
                agree = (reference_NTV.argmax(-1) == rounded_NTV.argmax(-1)).float().mean().item()
                found.setdefault((group_size, name), []).append((kl_M.mean().item(), kl_M.quantile(0.99).item(), agree))
        print(f"draw {draw + 1} of {options.draws}", file=sys.stderr)
    return [summary(found, group_size, name) for group_size, name in found]


def summary(found: dict, group_size: int, name: str) -> dict:
    """Means over draws, the standard error of the mean KL, and the ratio to the baseline, paired by draw."""
    kl, p99, agree = zip(*found[group_size, name], strict=True)
    ratios = [mine / theirs[0] for mine, theirs in zip(kl, found[group_size, BASELINE], strict=True)]
    error = [statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0 for values in (kl, ratios)]
    return {
        "group_size": group_size,
        "recipe": name,
        "kl": statistics.mean(kl),
        "kl_error": error[0],
        "kl_p99": statistics.mean(p99),
        "top1_agreement": statistics.mean(agree),
        "ratio": statistics.mean(ratios),
        "ratio_error": error[1],
    }


def main() -> int:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="trained, unquantised folder with a tokenizer")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[32, 64, 128], help="32 64 128 (all)")
    parser.add_argument("--draws", type=int, default=4, help="shuffles (4)")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows (32)")
    parser.add_argument("--row-tokens", type=int, default=128, help="tokens of a row (128)")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    table = measure(options)
    for row in table:
        print(
            f"g{row['group_size']:<4d}{row['recipe']:46s} KL {row['kl']:.5f} +- {row['kl_error']:.5f}"
            f"  p99 {row['kl_p99']:.4f}  top-1 {row['top1_agreement']:.4f}"
            f"  x{row['ratio']:.3f} +- {row['ratio_error']:.3f}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    content = {"model": str(options.model), "rows": options.rows, "row_tokens": options.row_tokens}
    RESULTS.write_text(json.dumps(content | {"draws": options.draws, "table": table}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
