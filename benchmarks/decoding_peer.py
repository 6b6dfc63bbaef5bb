"""One peer of benchmarks/decoding.py in a process of its own: loads once, then decodes when asked, line by line.

    python benchmarks/decoding_peer.py bf16-sparse FOLDER          stdin: {"threads": 1, "prompt": 32, "tokens": 16}

Answers are JSON lines: memory once the model is loaded, then times of each burst, through transformers' `generate`;
`int4-stream` decodes as `python -m quant generate` does.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import quant.runtime.loading
from herd.llama4 import use_sparse_experts
from herd.llama4.source import open_model
from quant.runtime.generation import Stream


class Times(BaseStreamer):
    """Wall and CPU time at the end of the prompt and of every token."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def put(self, value: Tensor) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def end(self) -> None:
        pass


def load(peer: str, folder: str) -> PreTrainedModel:
    """The model of a peer: `int4`, `int4-stream`, `bf16-sparse`, or `bf16`."""
    if peer.startswith("int4"):
        return quant.runtime.loading.load(folder)
    model = open_model(folder, dtype=torch.bfloat16).eval()
    return use_sparse_experts(model) if peer == "bf16-sparse" else model


def burst(model: PreTrainedModel, *, prompt: int, tokens: int, streamed: bool) -> dict[str, Any]:
    """Decode greedily; seconds of the prompt (with the first token) and of each token after it."""
    vocabulary = model.config.vocab_size
    input_1T = torch.randint(3, vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    times = Times()
    if streamed:
        model.generation_config.eos_token_id = None
        times.put(input_1T)
        for _ in Stream(model, max_new_tokens=tokens + 1).run(input_1T):
            times.put(input_1T)
    else:  # calls `put` with the prompt, then with every token
        settings = {"max_new_tokens": tokens + 1, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        model.generate(input_1T, **settings, streamer=times)
    return {
        "prefill_s": times.wall[1] - times.wall[0],
        "prefill_cpu_s": times.cpu[1] - times.cpu[0],
        "token_s": [b - a for a, b in zip(times.wall[1:], times.wall[2:], strict=False)],
        "token_cpu_s": [b - a for a, b in zip(times.cpu[1:], times.cpu[2:], strict=False)],
    }


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most so far)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def bandwidth() -> float:
    """Bytes a second that reading reaches, the best of several passes; by CPU time, since others use the machine."""
    block = torch.ones(1 << 26)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        block.sum()
        seconds.append((time.process_time() - start) / torch.get_num_threads())
    return block.nbytes / min(seconds)


def main(peer: str, folder: str) -> None:
    """Serve bursts until stdin ends."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    idle = resident("VmRSS")
    start = time.perf_counter()
    model = load(peer, folder)
    seconds = time.perf_counter() - start
    streamed = peer == "int4-stream"
    burst(model, prompt=32, tokens=1, streamed=streamed)
    memory = {"idle": idle, "peak": resident("VmHWM"), "resident": resident("VmRSS"), "load_s": seconds}
    print(json.dumps(memory), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        torch.set_num_threads(asked["threads"])
        answer = {"bandwidth": bandwidth()} if asked.get("bandwidth") else {}
        answer |= burst(model, prompt=asked["prompt"], tokens=asked["tokens"], streamed=streamed)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
