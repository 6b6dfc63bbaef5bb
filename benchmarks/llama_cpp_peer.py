"""llama.cpp as a peer of benchmarks/decoding.py, run by an interpreter that has llama-cpp-python; see decoding_peer.py.

python benchmarks/llama_cpp_peer.py MODEL.gguf                  stdin: {"threads": 1, "prompt": 32, "tokens": 16}
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

CONTEXT = 256


def open_model(path: str) -> tuple[Any, Any, int]:
    """Model, context and vocabulary size, with llama.cpp's own settings."""
    settings = llama_cpp.llama_model_default_params()
    settings.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = CONTEXT
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    return model, llama_cpp.llama_init_from_model(model, settings), vocabulary


def forward(context: Any, tokens: list[int], vocabulary: int) -> int:
    """Take up tokens and return the likeliest next one."""
    array = (llama_cpp.llama_token * len(tokens))(*tokens)  # the batch only points to it
    batch = llama_cpp.llama_batch_get_one(array, len(tokens))
    if llama_cpp.llama_decode(context, batch) != 0:
        raise SystemExit("llama_decode failed")
    return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(vocabulary,)).argmax())


def burst(context: Any, vocabulary: int, *, prompt: int, tokens: int) -> dict[str, Any]:
    """As decoding_peer's: seconds of the prompt and of each token after the first."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    wall, cpu = [time.perf_counter()], [time.process_time()]
    token = forward(context, np.random.default_rng(0).integers(3, vocabulary, prompt).tolist(), vocabulary)
    for _ in range(tokens):
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
        token = forward(context, [token], vocabulary)
    wall.append(time.perf_counter())
    cpu.append(time.process_time())
    steps = np.diff(wall).tolist(), np.diff(cpu).tolist()
    return {
        "prefill_s": steps[0][0],
        "prefill_cpu_s": steps[1][0],
        "token_s": steps[0][1:],
        "token_cpu_s": steps[1][1:],
    }


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most so far)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main(path: str) -> None:
    """Serve bursts until stdin ends."""
    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept alive as long as the library calls it
    llama_cpp.llama_log_set(silence, None)
    idle, start = resident("VmRSS"), time.perf_counter()
    _model, context, vocabulary = open_model(path)
    seconds = time.perf_counter() - start
    burst(context, vocabulary, prompt=32, tokens=1)
    memory = {"idle": idle, "peak": resident("VmHWM"), "resident": resident("VmRSS"), "load_s": seconds}
    print(json.dumps(memory), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        llama_cpp.llama_set_n_threads(context, asked["threads"], asked["threads"])
        print(json.dumps(burst(context, vocabulary, prompt=asked["prompt"], tokens=asked["tokens"])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
