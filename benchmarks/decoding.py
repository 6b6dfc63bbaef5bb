"""Decoding on a CPU, batch 1, end to end: int4 served by `quant.load` against transformers in bf16.

    python benchmarks/decoding.py [--rounds 9] [--tokens 12] [--threads 1 2] [--models DIR] [--llama-cpp PYTHON]

Llama 4 MoE models of about half a billion random weights. Every peer lives in a process of its own; bursts are
interleaved. Cases replace those of the same kind in results/decoding.json; --models keeps the folders.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from decoding_models import SHAPES, Model, build, quantise

from herd.run.files import write_atomic
from quant.readers import GGUF

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "decoding.json"
GROUP_SIZES = (64, 128)
PROMPT = 32
PEER = (sys.executable, str(HERE / "decoding_peer.py"))
GOALS = {"bf16-sparse": 2.0, "bf16": 6.0, "memory": 0.4}
SLOW = {"bf16": 4}  # burst of this many tokens: transformers' own experts take long


class Peer:
    """A child process with one model."""

    def __init__(self, name: str, words: list[str]):
        self.name = name
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.memory = self._answer()

    def burst(self, **asked: Any) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended with {self._process.wait()}")
        return json.loads(line)


def main() -> int:
    """Build, compare every shape at every number of threads, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="bursts of every peer (9)")
    parser.add_argument("--tokens", type=int, default=12, help="tokens of a burst (12)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (1 2)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="models (all)")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="interpreter with llama-cpp-python; gguf is needed here")
    parser.add_argument("--models", type=Path, help="folder to keep the models in (a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = options.models or Path(temporary)
        cases = [case for shape in options.shapes for case in compare(place, shape, options)]
    redone = {(case["shape"], case["threads"]) for case in cases}
    before = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else []
    cases = [case for case in before if (case["shape"], case["threads"]) not in redone] + cases
    machine = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    write_atomic(RESULTS, json.dumps({**machine, "goals": GOALS, "cases": cases}, indent=1) + "\n")
    return 0


def compare(place: Path, shape: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One case for each number of threads."""
    model = build(place / shape, shape)
    peers = []
    for size in GROUP_SIZES:
        folder = place / f"{shape}-int4-g{size}"
        quantise(place / shape, folder, group_size=size)
        peers.append(Peer(folder.name.removeprefix(f"{shape}-"), [*PEER, "int4", str(folder)]))
    folder = place / f"{shape}-int4-g{GROUP_SIZES[0]}"
    peers.append(Peer(f"stream-g{GROUP_SIZES[0]}", [*PEER, "int4-stream", str(folder)]))
    peers += [Peer(kind, [*PEER, kind, str(place / shape)]) for kind in ("bf16-sparse", "bf16")]
    if options.llama_cpp:
        folder = place / f"{shape}-gguf"
        quantise(place / shape, folder, group_size=32, container=GGUF)
        words = [options.llama_cpp, str(HERE / "llama_cpp_peer.py"), str(folder / "model.gguf")]
        peers.append(Peer("llama.cpp", words))
    try:
        return [measure(shape, model, peers, threads, options) for threads in options.threads]
    finally:
        for peer in peers:
            peer.close()


def measure(shape: str, model: Model, peers: list[Peer], threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved bursts of all peers; the first round only warms up."""
    bursts: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    for turn in range(options.rounds + 1):
        for peer in peers:
            tokens = SLOW.get(peer.name, options.tokens)
            asked = {"threads": threads, "prompt": PROMPT, "tokens": tokens, "bandwidth": peer is peers[0]}
            answer = peer.burst(**asked)
            if turn:
                bursts[peer.name].append(answer)
    bandwidth = max(answer["bandwidth"] for answer in bursts[peers[0].name])
    found = {peer.name: summarise(peer, bursts[peer.name]) for peer in peers}
    for size in (*GROUP_SIZES, None):
        name = "bf16-sparse" if size is None else f"int4-g{size}"
        floor = model.bytes_a_token(size) / bandwidth
        found[name] |= {"bytes_a_token": round(model.bytes_a_token(size)), "floor_ms": round(1e3 * floor, 2)}
    case = {"shape": shape, "weights": model.weights, "threads": threads, "peers": found}
    case["load_average"] = round(os.getloadavg()[0], 1)
    case |= {"bandwidth_gb_s": round(bandwidth / 1e9, 1), "ratios": {}}
    for size in GROUP_SIZES:
        case["ratios"][f"int4-g{size}"] = ratios(bursts, found, f"int4-g{size}")
    show(case)
    return case


def summarise(peer: Peer, bursts: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and quartiles over all tokens, wall and CPU; memory over that of the idle process, and whole."""
    result = {}
    for key, label in (("token_s", "token_ms"), ("token_cpu_s", "token_cpu_ms")):
        low, middle, high = statistics.quantiles([1e3 * s for burst in bursts for s in burst[key]], n=4)
        result[label] = {"median": round(middle, 2), "q1": round(low, 2), "q3": round(high, 2)}
    result["tokens_per_second"] = round(1e3 / result["token_ms"]["median"], 1)
    result["prefill_cpu_ms"] = round(1e3 * statistics.median(burst["prefill_cpu_s"] for burst in bursts), 1)
    memory = peer.memory
    return result | {
        "model_mb": round((memory["resident"] - memory["idle"]) / 1e6),
        "peak_over_idle_mb": round((memory["peak"] - memory["idle"]) / 1e6),
        "peak_mb": round(memory["peak"] / 1e6),
        "load_s": round(memory["load_s"], 1),
    }


def ratios(bursts: dict[str, list[dict]], found: dict[str, dict], ours: str) -> dict[str, Any]:
    """Times faster than every other peer (median over rounds of the ratio of medians, wall and CPU), and memory."""
    result = {}
    for name in (name for name in bursts if not name.startswith("int4")):
        for key, label in (("token_s", "wall"), ("token_cpu_s", "cpu")):
            pairs = zip(bursts[name], bursts[ours], strict=True)
            by_round = [statistics.median(theirs[key]) / statistics.median(mine[key]) for theirs, mine in pairs]
            low, middle, high = statistics.quantiles(by_round, n=4)
            result[f"{name} {label}"] = {"median": round(middle, 2), "q1": round(low, 2), "q3": round(high, 2)}
    for label in ("model_mb", "peak_over_idle_mb", "peak_mb"):
        result[label] = round(found[ours][label] / found["bf16-sparse"][label], 3)
    return result


def show(case: dict[str, Any]) -> None:
    """Print one case."""
    millions = case["weights"] / 1e6
    print(f"\n{case['shape']}, {millions:.0f} M weights, {case['threads']} threads, {case['bandwidth_gb_s']} GB/s")
    for name, peer in case["peers"].items():
        wall, cpu = peer["token_ms"], peer["token_cpu_ms"]
        print(
            f"  {name:12s}{peer['tokens_per_second']:8.1f} tokens/s  wall {wall['median']:7.1f} ms"
            f" ({wall['q1']:.1f}..{wall['q3']:.1f})  cpu {cpu['median']:7.1f} ms ({cpu['q1']:.1f}..{cpu['q3']:.1f})"
            f"  floor {peer.get('floor_ms', float('nan')):5.1f} ms  model {peer['model_mb']:5d} MB"
            f"  peak {peer['peak_over_idle_mb']:5d} (whole {peer['peak_mb']}) MB"
        )
    for name, found in case["ratios"].items():
        shown = [f"{key} {value['median'] if isinstance(value, dict) else value}" for key, value in found.items()]
        print(f"  {name} against bf16: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
