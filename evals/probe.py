"""Peak memory and decode speed of a model, measured alone: a fresh process per model, apart from who evaluates.

    with Probe() as probe: cost = probe.measure(folder, ids, decode_tokens=64)

`python -m evals.probe` is the other end: it imports the libraries once, then forks a clean child for every model.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TextIO

from herd.run import errors

# The probe is one process by itself, also when a rank of a distributed run starts it.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Cost(NamedTuple):
    """`peak_memory_bytes`: growth of resident memory over an idle process with the same libraries, while loading, one
    forward over `ids` and decoding; memory-mapped weights count. On an accelerator: its peak allocation."""

    peak_memory_bytes: int
    decode_tokens_per_s: float | None


class Probe:
    """Handle on the measuring process; starts it at once, so that its imports overlap with the caller's work."""

    def __init__(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "evals.probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    def measure(self, folder: str | Path, ids: Sequence[int], *, decode_tokens: int = 64, device: str = "cpu") -> Cost:
        """Measure one model: a forward over `ids`, then greedy decoding after them; 0 decode tokens for no timing."""
        request = {"folder": str(folder), "ids": list(ids), "decode_tokens": decode_tokens, "device": device}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the measuring process died"}')
        if "error" in answer:
            about = "" if str(folder) in answer["error"] else f"{folder}: "
            raise getattr(errors, answer.get("kind", "EnvironmentFault"))(f"{about}{answer['error']}")
        return Cost(**answer)

    def close(self) -> None:
        """End the measuring process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer every request line with one line of JSON, each measured in a forked child of this idle process."""
    import transformers
    from transformers import Llama4ForCausalLM  # noqa: F401 - the children share these imports

    import evals.decoding
    import evals.loading  # noqa: F401

    transformers.utils.logging.disable_progress_bar()

    for line in requests:
        child = os.fork()
        if child == 0:
            answers.write(json.dumps(_answer(json.loads(line))) + "\n")
            answers.flush()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 0:
            answers.write(
                json.dumps({"error": f"measuring ended with status {status}; is there enough memory?"}) + "\n"
            )
            answers.flush()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return _measure(**request)._asdict()
    except errors.HerdError as error:
        return {"kind": type(error).__name__, "error": str(error)}


def _measure(folder: str, ids: list[int], decode_tokens: int, device: str) -> Cost:
    import torch

    from evals.decoding import time_decoding
    from evals.loading import load_model

    _touch_code(device)
    idle = _resident("VmRSS")
    model = load_model(Path(folder), device=device)
    ids_1T = torch.tensor([ids], device=device)
    with torch.inference_mode():
        model(input_ids=ids_1T, use_cache=False)
    # Half the row at most, so that short-context models have room for what is generated.
    speed = time_decoding(model, ids_1T[:, : max(1, len(ids) // 2)], tokens=decode_tokens) if decode_tokens else None
    if device == "cpu":
        return Cost(_resident("VmHWM") - idle, speed)
    return Cost(torch.accelerator.max_memory_allocated(), speed)


def _touch_code(device: str) -> None:
    """Run a model of a few thousand parameters: the library code it pages in (tens of MB) is not the measured model's
    memory."""
    import torch

    from herd.run import bf16_products

    bf16_products.install()
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    from evals.decoding import decode
    from herd.llama4 import use_sparse_experts

    tiny = Llama4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        pad_token_id=None,
    )
    model = use_sparse_experts(Llama4ForCausalLM(tiny)).to(device, torch.bfloat16).eval()
    decode(model, torch.arange(32, device=device)[None], tokens=4)


def _resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (the most so far) of this process. ru_maxrss would include the parent's."""
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    # Whatever a library prints goes to stderr; the pipe carries answers only.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, pipe)
