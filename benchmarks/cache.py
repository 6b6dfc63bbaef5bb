"""Bytes against error of the teacher cache, on a trained teacher: ours, RS-KD and DistillKit at the same size.

    python benchmarks/cache.py [--model runs/behemoth-1000/students/behemoth] [--rows 32]

Every size is of files on disk, the whole folder; errors are E||t - p||^2, the expected squared error of a soft target,
which is that of the gradient on the student's logits. Speeds are CPU seconds of one thread. Writes
benchmarks/results/cache.json. Shapes: T tokens, V vocabulary, B rows, C tokens of a block, K classes.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from distillkit_codec import BUDGET, RECOMMENDED, DistillKit

from herd.data.batches import Batch
from herd.data.streams import fixed_batches
from herd.data.tokenizer import load_tokenizer
from herd.llama4 import use_sparse_experts
from herd.llama4.source import open_model
from herd.run.files import write_atomic
from herd.run.lineage import read_lineage
from herd.run.schema import Data
from teachers import cache
from teachers.cache.codecs.kept import BLOCK
from teachers.commands.sample import sample_bytes
from teachers.frozen import FrozenTeacher
from teachers.targets import DenseTargets, FullTargets, SparseTargets

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cache.json"
MODEL = ROOT / "runs" / "behemoth-1000" / "students" / "behemoth"
BIG = 202_048
OURS = 14
COUNT_BITS = 7
"""Of RS-KD's count of a class, as published; its id takes ceil(log2 V)."""
SHARED_BITS = 16
"""Entropy and cross-entropy of a token, which our file stores too."""


@dataclass(frozen=True)
class Case:
    """One teacher over one set of rows."""

    name: str
    targets: FullTargets
    labels_BT: torch.Tensor
    vocabulary: int

    @property
    def num_tokens(self) -> int:
        return self.labels_BT.numel()

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(slice, fp64 masses [C, V]) of all tokens."""
        for start in range(0, self.num_tokens, BLOCK):
            rows = slice(start, min(start + BLOCK, self.num_tokens))
            yield rows, self.targets.logits(rows).double().softmax(-1)


@dataclass(frozen=True)
class Measured:
    """A codec's file and what is read from it."""

    codec: str
    bytes_per_token: float
    squared_error: float
    error_of_mean: float
    classes: float
    encode_per_second: float
    decode_per_second: float


def store(case: Case, codec: str, *, seed: int = 0) -> tuple[float, SparseTargets, float, float]:
    """Write a cache to disk and read it back: bytes a token, targets, CPU seconds of both."""
    length = case.labels_BT.shape[1]
    identity = cache.Identity("bench", case.vocabulary, length, 1.0, "bench", "bench")
    keys_B = torch.arange(len(case.labels_BT)) * 104_729
    ids_BT = case.labels_BT  # whatever tokens: only their hash is kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        began = time.thread_time()
        with cache.create(path, identity, codec, seed=seed).writer() as writer:
            writer.append(case.targets, keys_B, ids_BT, case.labels_BT, step=0)
        encoded = time.thread_time()
        reader = cache.open(path, expecting=identity)
        opened = time.thread_time()
        targets = reader.targets(keys_B, ids_BT)
        decoded = time.thread_time()
        size = sum(file.stat().st_size for file in path.iterdir())
    return size / case.num_tokens, targets, encoded - began, decoded - opened


def errors(case: Case, ids_TK: torch.Tensor, probs_TK: torch.Tensor) -> tuple[float, float]:
    """Mean over tokens of ||t - p||^2 = ||t||^2 - 2 t.p + ||p||^2, and ||mean over tokens of (t - p)||^2.

    The second is what is left when errors average: for an unbiased target about the first over the number of tokens.
    """
    total, sum_V = 0.0, torch.zeros(case.vocabulary, dtype=torch.float64)
    for rows, p_CV in case.blocks():
        ids_CK, t_CK = ids_TK[rows].clamp_min(0), probs_TK[rows].double()
        total += float((t_CK**2 - 2 * t_CK * p_CV.gather(1, ids_CK)).sum() + (p_CV**2).sum())
        sum_V += torch.zeros_like(sum_V).scatter_add_(0, ids_CK.flatten(), t_CK.flatten()) - p_CV.sum(0)
    return total / case.num_tokens, float(((sum_V / case.num_tokens) ** 2).sum())


def measure(case: Case, codec: str, *, redraws: int) -> Measured:
    """Size and speed of one file, error over several."""
    drawn = [store(case, codec, seed=seed) for seed in range(redraws)]
    found = [errors(case, targets.ids_TK, targets.probs_TK) for _, targets, _, _ in drawn]
    size, targets, _, _ = drawn[0]
    return Measured(
        codec=codec,
        bytes_per_token=size,
        squared_error=sum(squared for squared, _ in found) / redraws,
        error_of_mean=sum(of_mean for _, of_mean in found) / redraws,
        classes=float((targets.ids_TK >= 0).sum()) / case.num_tokens,
        encode_per_second=case.num_tokens / min(seconds for _, _, seconds, _ in drawn),
        decode_per_second=case.num_tokens / min(seconds for _, _, _, seconds in drawn),
    )


def facts_of(case: Case) -> dict[str, float]:
    """Mean entropy and sum of squared masses, and the mean number of different classes among N draws, by N."""
    entropy = squares = 0.0
    for _, p_CV in case.blocks():
        entropy += float(torch.special.entr(p_CV).sum())
        squares += float((p_CV**2).sum())
    return {"entropy": entropy / case.num_tokens, "squares": squares / case.num_tokens}


def different_classes(case: Case, draws: int) -> float:
    """Mean number of classes among `draws` draws of a token: sum of 1 - (1 - p)^N."""
    return sum(float((1 - (1 - p_CV) ** draws).sum()) for _, p_CV in case.blocks()) / case.num_tokens


def smallest(size_of: Callable[[int], float], wanted: float) -> int:
    """The smallest number whose size (which grows by about the same for each) reaches `wanted`."""
    low, high = 8, 24
    slope = (size_of(high) - size_of(low)) / (high - low)
    number = max(1, round(low + (wanted - size_of(low)) / slope))
    while size_of(number) < wanted:
        number += 1
    while number > 1 and size_of(number - 1) >= wanted:
        number -= 1
    return number


def cache_size(case: Case, codec: str) -> Callable[[int], float]:
    """Bytes a token by the codec's number, each measured once."""
    return lru_cache(lambda number: store(case, f"{codec}={number}")[0])


def against_random(case: Case, ours: Measured, squares: float) -> dict[str, Any]:
    """RS-KD with as many bytes: in our file format, and as published (fixed-width ids and counts, no container)."""
    in_file = smallest(cache_size(case, "rs_kd"), ours.bytes_per_token)
    random = measure(case, f"rs_kd={in_file}", redraws=1)
    bits = (case.vocabulary - 1).bit_length() + COUNT_BITS

    @lru_cache
    def size_of(draws: int) -> float:
        return (different_classes(case, draws) * bits + SHARED_BITS) / 8

    published = smallest(size_of, ours.bytes_per_token)
    return {
        "in_our_format": {
            "draws": in_file,
            "bytes_per_token": random.bytes_per_token,
            "squared_error": (1 - squares) / in_file,
            "squared_error_measured": random.squared_error,
            "times_ours": (1 - squares) / in_file / ours.squared_error,
        },
        "as_published": {
            "draws": published,
            "bytes_per_token": size_of(published),
            "squared_error": (1 - squares) / published,
            "times_ours": (1 - squares) / published / ours.squared_error,
        },
    }


def against_distillkit(case: Case, codec: DistillKit, *, redraws: int) -> dict[str, Any]:
    """Its error at its size, and ours with as many classes as fit into no more bytes."""
    out: dict[str, Any] = {"bytes_per_token": codec.bytes_per_token(case.vocabulary)}
    for missing in ("zero", "symmetric_uniform"):
        parts = [codec.rebuilt(case.targets.logits(rows), missing=missing) for rows, _ in case.blocks()]
        ids_TK, probs_TK = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        out[f"squared_error_{missing}"], out[f"error_of_mean_{missing}"] = errors(case, ids_TK, probs_TK)
    largest = out["bytes_per_token"]
    size = smallest(cache_size(case, "head_and_tail"), largest + 1e-9) - 1  # never more bytes than it has
    ours = measure(case, f"head_and_tail={size}", redraws=redraws)
    out |= {"ours": vars(ours)}
    for missing in ("zero", "symmetric_uniform"):
        out[f"times_ours_{missing}"] = out[f"squared_error_{missing}"] / ours.squared_error
    return out


def run(case: Case, *, redraws: int) -> dict[str, Any]:
    """Everything about one case."""
    facts = facts_of(case)
    ours = measure(case, f"head_and_tail={OURS}", redraws=redraws)
    result = {"case": case.name, "vocabulary": case.vocabulary, "tokens": case.num_tokens, **facts, "ours": vars(ours)}
    print_ours(case, facts, ours)
    result["rs_kd"] = against_random(case, ours, facts["squares"])
    for name, line in result["rs_kd"].items():
        print(
            f"  RS-KD {name.replace('_', ' '):<15} N={line['draws']:<4} {line['bytes_per_token']:7.2f} B"
            f"  {line['squared_error']:.3e}  {line['times_ours']:.2f} x ours",
            flush=True,
        )
    for name, codec in (("budget", BUDGET), ("recommended", RECOMMENDED)):
        line = result[f"distillkit_{name}"] = against_distillkit(case, codec, redraws=redraws)
        print(
            f"  DistillKit {name:<11}      {line['bytes_per_token']:7.2f} B  {line['squared_error_zero']:.3e} (zero)"
            f" {line['squared_error_symmetric_uniform']:.3e} (uniform);"
            f" {line['ours']['codec']} {line['ours']['bytes_per_token']:.2f} B {line['ours']['squared_error']:.3e};"
            f" of the mean {line['error_of_mean_zero']:.1e} {line['error_of_mean_symmetric_uniform']:.1e}"
            f" {line['ours']['error_of_mean']:.1e}",
            flush=True,
        )
    return result


def print_ours(case: Case, facts: dict[str, float], ours: Measured) -> None:
    print(f"{case.name}: V = {case.vocabulary:,}, {case.num_tokens:,} tokens, {facts['entropy']:.2f} nats")
    print(
        f"  {ours.codec:<28} {ours.bytes_per_token:7.2f} B  {ours.squared_error:.3e}  "
        f"{ours.classes:.2f} classes, encode {ours.encode_per_second:,.0f}, decode {ours.decode_per_second:,.0f} tok/s",
        flush=True,
    )


def heldout(model: Path, rows: int) -> list[Batch]:
    """Held-out rows of what the model was trained on."""
    data = Data.model_validate(read_lineage(model).get("data_config") or {})
    return fixed_batches(data, load_tokenizer(model), "heldout", rows=rows)


def real_teacher(model: Path, rows: int) -> Case:
    """A trained model's own outputs."""
    batches = heldout(model, rows)
    teacher = FrozenTeacher(use_sparse_experts(open_model(str(model), dtype="auto")))
    parts = [teacher.targets(batch.input_ids_BT) for batch in batches]
    logits_TV = torch.cat([part.logits(slice(0, part.num_tokens)).float() for part in parts])
    labels_BT = torch.cat([batch.labels_BT for batch in batches])
    return Case("trained teacher", DenseTargets(logits_TV), labels_BT, logits_TV.shape[1])


def spread(case: Case, rows: int) -> Case:
    """The same teacher over the big vocabulary: each class is split among many ids, unevenly, scattered at random.

    No id is likelier than another beforehand: the dearest case for ids.
    """
    generator = torch.Generator().manual_seed(0)
    each = BIG // case.vocabulary
    ids_VM = torch.randperm(BIG, generator=generator)[: each * case.vocabulary].view(case.vocabulary, each)
    shares_M = (torch.arange(each) + 1.0) ** -2.5
    shares_M /= shares_M.sum()
    labels_BT = case.labels_BT[:rows]
    logs_TV = case.targets.logits(slice(0, labels_BT.numel())).log_softmax(-1)
    logits_TW = torch.full((len(logs_TV), BIG), -60.0)
    logits_TW[:, ids_VM.flatten()] = (logs_TV[..., None] + shares_M.log()).flatten(1)
    return Case(f"{case.name}, spread over the big vocabulary", DenseTargets(logits_TW), ids_VM[:, 0][labels_BT], BIG)


def sharpened(case: Case, factor: float) -> Case:
    """As if the teacher were surer: logits times a factor. Nano teachers are flatter than large ones."""
    logits_TV = case.targets.logits(slice(0, case.num_tokens)) * factor
    return Case(f"trained teacher, logits x {factor:g}", DenseTargets(logits_TV), case.labels_BT, case.vocabulary)


def arithmetic() -> list[dict[str, Any]]:
    """Bytes of the made-up 3-nat teacher of `--dry-run` at known vocabularies, beside DistillKit's formula."""
    return [
        {
            "vocabulary": vocabulary,
            "ours": sample_bytes(f"head_and_tail={OURS}", vocabulary, 8192),
            "distillkit_budget": BUDGET.bytes_per_token(vocabulary),
            "distillkit_recommended": RECOMMENDED.bytes_per_token(vocabulary),
        }
        for vocabulary in (32_000, 50_257, 128_256, 151_936, BIG)
    ]


def main() -> int:
    """Run every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, default=MODEL, help="trained teacher (runs/behemoth-1000/students/behemoth)"
    )
    parser.add_argument("--rows", type=int, default=32, help="held-out rows; an eighth of them at the big vocabulary")
    parser.add_argument("--redraws", type=int, default=8, help="files an error is a mean over")
    arguments = parser.parse_args()
    if not arguments.model.is_dir():
        print(f"no model at {arguments.model}; train it: python -m distill --config configs/experiments/teacher.yaml")
        return 2
    torch.set_num_threads(1)
    real = real_teacher(arguments.model, arguments.rows)
    few = max(1, arguments.rows // 8)
    cases = [real, sharpened(real, 1.5), sharpened(real, 2.0)]
    big = [spread(real, few), spread(sharpened(real, 2.0), few)]
    result = {
        "model": arguments.model.name,
        "torch": torch.__version__,
        "cases": [run(case, redraws=arguments.redraws) for case in cases] + [run(case, redraws=2) for case in big],
        "arithmetic": arithmetic(),
    }
    for line in result["arithmetic"]:
        print(
            "  ".join(
                f"{name} {value:,.1f}" if name != "vocabulary" else f"V {value:>7,}" for name, value in line.items()
            )
        )
    RESULTS.parent.mkdir(exist_ok=True)
    write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
