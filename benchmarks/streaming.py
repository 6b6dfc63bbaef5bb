"""Peak memory and bytes a second of `python -m quant` on checkpoints in Llama 4's layout, several times its memory.

    python benchmarks/streaming.py [--case rtn-8 rtn-34 gptq-2 gptq-4 gptq-8 gated-2 gated-8] [--scratch DIR]

Every case makes a checkpoint of random weights in shards of 2 GB in a temporary folder of --scratch, drops it from the
page cache, quantises it in a fresh process while /proc is read, and removes everything. Writes results/streaming.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Tokens
from tokenizers import models, pre_tokenizers
from torch import Tensor
from transformers import Llama4TextConfig, PreTrainedTokenizerFast

from quant.architectures import build_skeleton
from quant.calibration.rows import BATCH_TOKENS
from quant.formats.format import Header
from quant.memory import total_bytes
from quant.methods.gated import BATCH_BYTES
from quant.shards import write_shards

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "streaming.json"
MEMORY_GB = 0.25
ROWS = ["--calibration", "stdlib", "--calibration-rows", "16", "--most-rows", "16", "--row-tokens", "512"]
GPTQ = ["--method", "gptq", *ROWS, "--memory", str(MEMORY_GB)]
GATED = ["--method", "gptq-gated", *ROWS, "--memory", str(MEMORY_GB + BATCH_BYTES / 1e9)]
IMPORTS = "import quant.exports, quant.gate_process, quant.quantized, quant.calibration.draw"
# Decoder layers, hidden size, experts, and what the command is told.
CASES: dict[str, tuple[int, int, int, list[str]]] = {
    "rtn-8": (8, 2048, 8, []),
    "rtn-34": (34, 2048, 8, []),
    "gptq-2": (2, 512, 16, GPTQ),
    "gptq-4": (4, 512, 16, GPTQ),
    "gptq-8": (8, 512, 16, GPTQ),
    "gated-2": (2, 512, 16, GATED),
    "gated-8": (8, 512, 16, GATED),
}
SHARD_BYTES = 2 * 10**9
PROBE_BYTES = 1 << 30
SECONDS = 0.05  # between two looks at /proc


def layout(layers: int, width: int, experts: int) -> Llama4TextConfig:
    """A text-only Scout of another size: 124 M weights a layer at a width of 2048 with 8 experts."""
    return Llama4TextConfig(
        vocab_size=32768, hidden_size=width, intermediate_size=width, intermediate_size_mlp=2 * width,
        num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=8, head_dim=64,
        num_local_experts=experts, num_experts_per_tok=1, interleave_moe_layer_step=1, max_position_embeddings=4096,
        attention_chunk_size=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        architectures=["Llama4ForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


class Drawn(Mapping[str, Tensor]):
    """Random tensors, none of them kept."""

    def __init__(self, headers: dict[str, Header]):
        self._headers = headers

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self._headers[name]
        deviation = 0.02 if len(shape) > 1 else 0.1
        return torch.empty(shape, dtype=dtype).normal_(1.0 if len(shape) == 1 else 0.0, deviation)

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


def make_checkpoint(folder: Path, config: Llama4TextConfig) -> int:
    """Write it as Llama 4 is published: fused experts, shards, an index. Returns its bytes."""
    folder.mkdir()
    config.save_pretrained(folder)
    state = build_skeleton(config, fused=True).state_dict()
    headers = {name: (torch.bfloat16, tuple(tensor.shape)) for name, tensor in state.items()}
    torch.manual_seed(0)
    write_shards(folder, headers, Drawn(headers), shard_bytes=SHARD_BYTES)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokens(models.BPE(vocab={token: number for number, token in enumerate(["<s>", *alphabet])}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="<s>").save_pretrained(folder)
    return sum(forget(path) for path in folder.glob("*.safetensors"))


def forget(path: Path) -> int:
    """Flush a file and drop it from the page cache; returns its bytes."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path.stat().st_size


def disk_rates(folder: Path) -> dict[str, float]:
    """Bytes a second that one file is written (flushed) and read back (dropped from the cache before) with."""
    path, block = folder / "disk.bin", os.urandom(1 << 24)
    started = time.monotonic()
    with path.open("wb") as file:
        for _ in range(PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    written = time.monotonic() - started
    forget(path)
    started = time.monotonic()
    with path.open("rb", buffering=0) as file:
        while file.read(len(block)):
            pass
    read = time.monotonic() - started
    path.unlink()
    return {"write_bytes_per_s": PROBE_BYTES / written, "read_bytes_per_s": PROBE_BYTES / read}


class Watch(threading.Thread):
    """Looks at a process and what it started until it ends: peaks of each, and of all together."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._pid = pid
        self._over = threading.Event()
        self.peaks: dict[str, dict[str, int]] = {}
        self.together = 0
        self.highest: list[tuple[float, int]] = []
        """Time of day, and the quantising process's peak so far."""

    def run(self) -> None:
        while not self._over.wait(SECONDS):
            seen = {kind: status(pid) for kind, pid in family(self._pid).items()}
            self.highest.append((time.time(), seen["quantising"].get("VmHWM", 0)))
            self.together = max(self.together, sum(facts.get("VmRSS", 0) for facts in seen.values()))
            for kind, facts in seen.items():
                kept = self.peaks.setdefault(kind, {})
                for key, value in facts.items():
                    kept[key] = max(kept.get(key, 0), value)

    def end(self) -> None:
        self._over.set()
        self.join()

    def peak_until(self, moment: float) -> int:
        """Of the quantising process, before it checks what it has written."""
        return max(peak for when, peak in self.highest if when <= moment)


def family(pid: int) -> dict[str, int]:
    """The quantising process and its gate."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = children.read_text().split() if children.exists() else []
    gates = [int(child) for child in found if "--serve" in command_line(int(child))]
    return {"quantising": pid} | ({"gate": gates[0]} if gates else {})


def command_line(pid: int) -> str:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_text() if path.exists() else ""


def status(pid: int) -> dict[str, int]:
    """Bytes of memory by the kernel's own names: VmHWM is the peak of VmRSS, which is RssAnon and RssFile together."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return {}
    wanted = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    found = dict(line.split(":", 1) for line in lines)
    return {key: 1024 * int(found[key].split()[0]) for key in wanted if key in found}


def run_case(name: str, scratch: Path) -> dict[str, Any]:
    """Make the checkpoint, plan, quantise, measure."""
    layers, width, experts, more = CASES[name]
    config = layout(layers, width, experts)
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        source, out = Path(temporary) / "source", Path(temporary) / "out"
        size = make_checkpoint(source, config)
        disk = disk_rates(Path(temporary))
        command = [sys.executable, "-m", "quant", "--model", str(source), "--scheme", "int4", "--out", str(out)]
        command += [*more, "--no-tracking", "--json"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        plan = subprocess.run([*command, "--dry-run"], env=environment, capture_output=True, text=True, check=True)
        before = os.times()
        wall, started = time.time(), time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        watch = Watch(process.pid)
        watch.start()
        answer = process.communicate()[0]
        seconds = time.monotonic() - started
        watch.end()
        assert process.returncode == 0, process.returncode
        after = os.times()
        done = max(path.stat().st_mtime for path in out.glob("*.safetensors"))
        written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        shutil.rmtree(source)
    cpu = sum(after[2:4]) - sum(before[2:4])
    quantising = done - wall
    copying = size / disk["read_bytes_per_s"] + written / disk["write_bytes_per_s"]
    return {
        "case": name,
        "layers": layers,
        "hidden_size": width,
        "experts": experts,
        "checkpoint_bytes": size,
        "layer_bytes": layer_bytes(config),
        "export_bytes": written,
        "peak_rss_bytes": {kind: facts["VmHWM"] for kind, facts in watch.peaks.items()},
        "floor_bytes": floor_bytes(config, float(more[-1])) if more else {},
        "peak_rss_before_check_bytes": watch.peak_until(done),
        "peak_rss_together_bytes": watch.together,
        "peaks": watch.peaks,
        "planned": {key: value for key, value in json.loads(plan.stdout).items() if key.startswith("estimated")},
        "seconds": seconds,
        "seconds_quantising": quantising,
        "cpu_seconds": cpu,
        "disk": disk,
        "seconds_to_copy": copying,
        "bytes_per_s": (size + written) / seconds,
        "bytes_per_s_quantising": (size + written) / quantising,
        "disk_share_quantising": copying / quantising,
        "checked": json.loads(answer)["gate"]["facts"]["checked"],
        "command": " ".join(["python -m quant --scheme int4", *more]),
    }


def floor_bytes(config: Llama4TextConfig, memory_gb: float) -> dict[str, int]:
    """What gptq needs: the libraries, a decoder layer quantised and not, Hessians as allowed, a batch twice."""
    code = f"{IMPORTS}; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return {
        "libraries": 1024 * int(found.stdout),
        "layers": 2 * layer_bytes(config),
        "hessians": int(1e9 * memory_gb),
        "batch": 2 * 2 * BATCH_TOKENS * config.hidden_size,
    }


def layer_bytes(config: Llama4TextConfig) -> int:
    """Of one decoder layer in bf16."""
    layer = build_skeleton(config, fused=True).model.layers[0]
    return 2 * sum(parameter.numel() for parameter in layer.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES, help="those to run (all)")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where there is room for 12 GB"
    )
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cases": {}}
    results["machine"] = {"memory_bytes": total_bytes(), "threads": 1, "cache": "source dropped before, export warm"}
    for name in options.case:
        found = run_case(name, options.scratch)
        results["cases"][name] = found
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(describe(found), flush=True)


def describe(found: dict[str, Any]) -> str:
    peaks = ", ".join(f"{kind} {size / 1e6:,.0f} MB" for kind, size in found["peak_rss_bytes"].items())
    sizes = f"{found['checkpoint_bytes'] / 1e9:.2f} GB -> {found['export_bytes'] / 1e9:.2f} GB"
    return (
        f"{found['case']}: {sizes}, peak {peaks}, "
        f"before the check {found['peak_rss_before_check_bytes'] / 1e6:,.0f} MB, "
        f"together {found['peak_rss_together_bytes'] / 1e6:,.0f} MB; {found['seconds']:.0f} s, "
        f"{found['seconds_quantising']:.0f} s of them quantising ({found['cpu_seconds']:.0f} s CPU), "
        f"{found['bytes_per_s_quantising'] / 1e6:.0f} MB/s, {found['disk_share_quantising']:.2f} of the disk's rate"
    )


if __name__ == "__main__":
    main()
