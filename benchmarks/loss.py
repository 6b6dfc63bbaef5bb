"""Memory and CPU time of the distillation loss against its peers: head, forward KL, both gradients.

    pip install --no-deps --target .cache/peers trl==1.16.0 liger-kernel==0.8.5 torchtune==0.6.1
    python benchmarks/loss.py [--rounds 5] [--quick]

Memory: one process a case, peak resident size above the inputs. Time: process CPU time, all variants interleaved in one
process. Peers that are not installed are left out by name. Writes benchmarks/results/loss.json.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from distill.losses import LinearTargets, fused_linear_distillation

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".cache" / "peers"
RESULTS = ROOT / "benchmarks" / "results" / "loss.json"
WIDTH, TEACHER_WIDTH = 256, 384
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [(2048, 32_000, "fp32"), (8192, 32_000, "fp32"), (2048, 32_000, "bf16"), (8192, 32_000, "bf16")]
BIG = [(2048, 202_048, "fp32"), (2048, 202_048, "bf16")]

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(tokens: int, vocabulary: int, dtype: str) -> Inputs:
    """Student hidden and head (both to be differentiated), teacher hidden and head, labels; random, logits near +-4."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DTYPES[dtype])

    hidden, head = draw(tokens, WIDTH), draw(vocabulary, WIDTH).mul_(2 / WIDTH**0.5)
    teacher, teacher_head = draw(tokens, TEACHER_WIDTH), draw(vocabulary, TEACHER_WIDTH).mul_(2 / TEACHER_WIDTH**0.5)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(), teacher, teacher_head, labels


def ours(hidden, head, teacher, teacher_head, labels) -> torch.Tensor:
    return fused_linear_distillation(hidden, head, labels, LinearTargets(teacher, teacher_head), alpha=1.0).loss


def naive(hidden, head, teacher, teacher_head, labels) -> torch.Tensor:
    """What one writes first: whole logits of both, in fp32."""
    log_q = functional.log_softmax((hidden @ head.T).float(), dim=-1)
    with torch.no_grad():
        log_p = functional.log_softmax((teacher @ teacher_head.T).float(), dim=-1)
    return functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def trl(hidden, head, teacher, teacher_head, labels) -> torch.Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(hidden, head, None, teacher, teacher_head, None, 0.0)[0].mean()


def liger(hidden, head, teacher, teacher_head, labels) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    return loss(hidden, head, teacher, teacher_head, labels)


def torchtune(hidden, head, teacher, teacher_head, labels) -> torch.Tensor:
    """Its file is loaded by itself: the package's __init__ wants a torchao of another torch."""
    path = PEERS / "torchtune" / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    student = [chunk @ head.T for chunk in hidden[None].chunk(8, dim=1)]
    with torch.no_grad():
        target = [chunk @ teacher_head.T for chunk in teacher[None].chunk(8, dim=1)]
    return module.ForwardKLWithChunkedOutputLoss(8)(student, target, labels[None])


VARIANTS: dict[str, Callable[..., torch.Tensor]] = {
    "ours": ours,
    "naive": naive,
    "TRL": trl,
    "Liger": liger,
    "torchtune": torchtune,
}
FOLDERS = {"TRL": "trl", "Liger": "liger_kernel", "torchtune": "torchtune"}


def run(variant: str, inputs: Inputs) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss and both gradients."""
    hidden, head, *_ = inputs
    hidden.grad = head.grad = None
    loss = VARIANTS[variant](*inputs)
    loss.backward()
    return loss.item(), hidden.grad, head.grad


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure_memory(variant: str, tokens: int, vocabulary: int, dtype: str) -> None:
    """In a process of its own: prints the peak above the inputs, in bytes."""
    run(variant, make_inputs(32, 512, dtype))  # loads libraries and starts thread pools
    inputs = make_inputs(tokens, vocabulary, dtype)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    run(variant, inputs)
    print(json.dumps({"peak": resident("VmHWM") - before}))


def memory_of(variant: str, case: tuple[int, int, str], rounds: int) -> list[int]:
    words = [sys.executable, __file__, "--worker", variant, *map(str, case)]
    environment = os.environ | {
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{PEERS}",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    peaks = []
    for _ in range(rounds):
        out = subprocess.run(words, env=environment, capture_output=True, text=True)
        if out.returncode:
            raise RuntimeError(f"{variant} at {case}: {out.stderr.strip().splitlines()[-1]}")
        peaks.append(json.loads(out.stdout.splitlines()[-1])["peak"])
    return peaks


def time_of(variants: list[str], case: tuple[int, int, str], rounds: int) -> dict[str, dict]:
    """CPU seconds of every variant, interleaved, and the largest difference of its gradients to ours."""
    inputs, seconds, found = make_inputs(*case), {name: [] for name in variants}, {}
    for round_ in range(rounds + 1):
        for name in variants:
            started = time.process_time()
            loss, *gradients = run(name, inputs)
            if round_:
                seconds[name].append(time.process_time() - started)
            else:
                found[name] = (loss, [g.float() for g in gradients])
    reference = found["ours"][1]
    differences = {
        name: max((a - b).abs().max().item() for a, b in zip(gradients, reference, strict=True))
        for name, (_, gradients) in found.items()
    }
    return {
        name: {"cpu_s": seconds[name], "max_gradient_difference": differences[name], "loss": found[name][0]}
        for name in variants
    }


def floor_of(case: tuple[int, int, str]) -> int:
    """Bytes no gradient-in-forward can do without: both gradients, and two chunks of 64 tokens."""
    tokens, vocabulary, dtype = case
    return ((vocabulary + tokens) * WIDTH + 2 * 64 * vocabulary) * DTYPES[dtype].itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="only the smallest case of each precision")
    parser.add_argument("--big", action="store_true", help="only the vocabulary of 202,048")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        variant, tokens, vocabulary, dtype = arguments.worker
        measure_memory(variant, int(tokens), int(vocabulary), dtype)
        return
    sys.path.append(str(PEERS))
    variants = [name for name in VARIANTS if name not in FOLDERS or (PEERS / FOLDERS[name]).exists()]
    for name in VARIANTS.keys() - set(variants):
        print(f"{name}: not installed, left out")
    rows = []
    cases = CASES[::2] if arguments.quick else BIG if arguments.big else CASES + BIG
    for case in cases:
        times = time_of(variants, case, arguments.rounds)
        base_time = statistics.median(times["ours"]["cpu_s"])
        print(f"\n{case[0]} tokens, vocabulary {case[1]}, {case[2]}; floor {floor_of(case) / 2**20:.0f} MiB")
        peaks = {name: memory_of(name, case, max(1, arguments.rounds // 2)) for name in variants}
        for name in variants:
            peak, seconds = statistics.median(peaks[name]), times[name]["cpu_s"]
            row = {"case": case, "variant": name, "peak_bytes": peaks[name], "floor_bytes": floor_of(case)} | times[
                name
            ]
            rows.append(row)
            print(
                f"  {name:10} peak {peak / 2**20:7.0f} MiB ({peak / statistics.median(peaks['ours']):5.1f}x ours)   "
                f"CPU {statistics.median(seconds):6.2f} s [{min(seconds):.2f}, {max(seconds):.2f}] "
                f"({statistics.median(seconds) / base_time:4.2f}x ours)   "
                f"largest gradient difference {row['max_gradient_difference']:.1e}"
            )
        RESULTS.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
