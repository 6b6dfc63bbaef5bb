"""bf16 matrix products of torch against those of herd.run.bf16_products, one thread, taken in turn.

    OMP_NUM_THREADS=1 python benchmarks/bf16_products.py [--rounds 7]

Forward products (times a transposed weight) and those of a gradient (times the weight), of one row up to 2048, with a
nano weight and a larger one. CPU seconds: medians of the rounds, and the range of the paired ratios. Writes
results/bf16_products.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from herd.run import bf16_products
from herd.run.files import write_atomic

RESULTS = Path(__file__).parent / "results" / "bf16_products.json"
SIZES = [(rows, 256, 512) for rows in (1, 2, 4, 8, 256, 2048)] + [(rows, 2048, 2048) for rows in (1, 2, 4, 8)]
SECONDS = 0.02


def seconds_a_call(call: Callable[[], torch.Tensor], calls: int) -> float:
    """CPU seconds of this process."""
    started = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - started) / calls


def compare(rows: int, inner: int, columns: int, kind: str, rounds: int) -> dict[str, object]:
    """One product in both ways, alternating; the values are compared too."""
    weight = torch.randn(columns, inner).bfloat16()
    left = torch.randn(rows, inner if kind == "forward" else columns).bfloat16()
    right = weight.T if kind == "forward" else weight

    def multiply() -> torch.Tensor:
        return left @ right

    exact = left.double() @ right.double()
    torchs, ours = [], []
    for _ in range(rounds):
        calls = max(1, int(SECONDS / max(seconds_a_call(multiply, 1), 1e-6)))
        torchs.append(seconds_a_call(multiply, calls))
        bf16_products.replace(True)
        error = (multiply().double() - exact).abs().max().item()
        ours.append(seconds_a_call(multiply, calls))
        bf16_products.replace(False)
    ratios = [theirs / mine for theirs, mine in zip(torchs, ours, strict=True)]
    return {
        "rows": rows, "inner": inner, "columns": columns, "kind": kind, "torch_s": statistics.median(torchs),
        "ours_s": statistics.median(ours), "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "gflops": 2e-9 * rows * inner * columns / statistics.median(ours), "largest_error": error,
        "largest_value": exact.abs().max().item(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    own = "a plain loop, so herd replaces them" if bf16_products.are_slow() else "instructions, so herd keeps them"
    print(f"{torch.backends.cpu.get_cpu_capability()}; torch's bf16 products here: {own}")
    print("rows x inner x columns  kind       torch, us    ours, us   ratio (range)          ours, GFLOP/s")
    cases = []
    for size in SIZES:
        for kind in ("forward", "gradient"):
            case = compare(*size, kind, options.rounds)
            (low, high), times = case["ratio_range"], (case["torch_s"] * 1e6, case["ours_s"] * 1e6)
            print(
                f"{' x '.join(map(str, size)):22}  {kind:8} {times[0]:11,.0f} {times[1]:11,.0f}"
                f"  {case['ratio']:6.1f} ({low:.1f} - {high:.1f})   {case['gflops']:8.1f}"
            )
            cases.append(case)
    result = {"capability": torch.backends.cpu.get_cpu_capability(), "slow": bf16_products.are_slow(), "cases": cases}
    write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
